"""An equation told as sentences, one per operation, the way a worked solution tells it."""

import ast
import operator
from fractions import Fraction

OPERATIONS = {
    ast.Add: ("addition", "+", operator.add),
    ast.Sub: ("subtraction", "-", operator.sub),
    ast.Mult: ("multiplication", "*", operator.mul),
    ast.Div: ("division", "/", operator.truediv),
}


def tell_equation(equation: str) -> tuple[str, Fraction]:
    """Tells how an equation is worked out, innermost brackets first.

    Args:
      equation: Numbers, the four operations and brackets; `X=` may stand in front of it.

    Returns:
      The sentences, and the value in which the last one ends. A bare number is its own sentence.

    Raises:
      ValueError: the equation holds anything else, or can't be read.
      ZeroDivisionError: it divides by zero.

    Example:
      >>> tell_equation("X=((32.0+42.0)-35.0)")
      ('First, 32 + 42 = 74. Then, 74 - 35 = 39.', Fraction(39, 1))
      >>> tell_equation("( 60.0 * ( 55.0 / 15.0 ) )")[0]
      'First, 55 / 15 = 11/3. Then, 60 * (11/3) = 220.'
    """
    steps: list[str] = []
    value = _work_out(_tree(equation), steps)
    if not steps:
        return f"The answer is {write_number(value)}.", value
    if len(steps) == 1:
        return f"{steps[0]}.", value
    words = ["First", *["Then"] * (len(steps) - 1)]
    return " ".join(f"{word}, {step}." for word, step in zip(words, steps, strict=True)), value


def name_operations(equation: str) -> str:
    """The operations of an equation in the order in which they are worked out.

    Example:
      >>> name_operations("X=(4.0*(7.0+8.0))")
      'addition, multiplication'
    """
    nodes = [node for node in ast.walk(_tree(equation)) if isinstance(node, ast.BinOp)]
    return ", ".join(OPERATIONS[type(node.op)][0] for node in reversed(nodes))


def write_number(value: Fraction) -> str:
    """A number as people write it: `39`, `2.5`, and `11/3` where decimals never end.

    Example:
      >>> write_number(Fraction(-5, 2)), write_number(Fraction(11, 3))
      ('-2.5', '11/3')
    """
    ends = value.denominator
    for prime in (2, 5):
        while ends % prime == 0:
            ends //= prime
    return f"{float(value):.12g}" if ends == 1 and value.denominator > 1 else str(value)


def _tree(equation: str) -> ast.expr:
    try:
        return ast.parse(equation.strip().removeprefix("X=").strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(
            f"an equation such as (4 + 3) * 2 was expected; got {equation!r}."
        ) from None


def _work_out(node: ast.expr, steps: list[str]) -> Fraction:
    """The node's value; appends one step per operation below and at it."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
        raise ValueError(f"equations hold numbers, + - * / and brackets; got {ast.unparse(node)}.")
    left, right = _work_out(node.left, steps), _work_out(node.right, steps)
    _, sign, operate = OPERATIONS[type(node.op)]
    value = operate(left, right)
    steps.append(f"{_operand(left)} {sign} {_operand(right)} = {write_number(value)}")
    return value


def _operand(value: Fraction) -> str:
    text = write_number(value)
    return f"({text})" if "/" in text or value < 0 else text
