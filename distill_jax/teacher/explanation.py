"""A worked solution told in one of several ways, right or wrong on purpose.

What the built-in tutor says. A step is one sentence or line of the solution. A wrong telling goes
wrong in one step and carries that through, so that its final answer really is wrong.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from distill_jax.answers import read_answer, same_answer
from distill_jax.questions.equations import tell_equation, write_number
from distill_jax.records import Question

OPENINGS = (("", ""), ("First, ", "Then, "), ("First, ", "Next, "), ("", "Then, "))
"""What stands before the first step, and before each later one."""

CLOSINGS = (
    "It is {answer}.",  # left out unless something must stand here
    "So, the answer is {answer}.",
    "The answer is {answer}.",
    "Therefore, the answer is {answer}.",
)
"""How a telling ends. A choice always ends in the last of these."""

WRONG_STEP = "The first wrong step was {step}."
WRONG_ANSWER = "It is wrong to say {answer}."
NUM_WORDINGS = len(OPENINGS) * len(CLOSINGS)

_DIGITS = r"\d+(?:,\d{3})*(?:\.\d+)?"
_OPERAND = rf"[$(]*-?\$?{_DIGITS}\)*"
_EQUATION = re.compile(
    rf"(?P<left>{_OPERAND}(?:\s?[-+*/x\u00d7\u00f7]\s?{_OPERAND})+)\s?=\s?\$?(?P<result>-?{_DIGITS})"
)
_NUMBER = re.compile(rf"(?<![\w.]){_DIGITS}(?!\w)")
_SLIPS = (1, -1, 2, -2, 10, -10)  # what a wrong step is off by
_MISREADINGS = _SLIPS[::2]  # and an answer that no step leads to
_PLAIN = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "$": None, ",": None})
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[A-Z0-9$(])"
)
_OPENED = re.compile(r"(?:First|Then|Next|Now|Finally|Thus|So|Therefore), ")
_CONCLUSION = re.compile(r"(?:(?:So|Thus|Therefore|Hence),? )?the answer is\b", re.IGNORECASE)
_SMALL = re.compile(
    r"(?:An?|The|Th(?:at|is|ere|ey|eir)|After|All|At|Each|Every|For|He|Her|His|If|In|Its?|Of|She|To|With)\b"
)  # fmt: skip


class Equation(NamedTuple):
    """A step of a calculation as it stands in a text."""

    start: int  # of its left side
    left: str
    right: slice  # of the text: its right side
    value: Fraction  # of the left side
    result: Fraction  # what the right side says it is

    @property
    def key(self) -> tuple[list[Fraction], Fraction]:
        """Equal for equations that differ in the order of their numbers only."""
        return sorted(_numbers(self.left.translate(_PLAIN))), self.result


def explain(question: Question, *, mistake: str | None, wrong: bool, way: int, seed: str) -> str:
    """Tells how a question is solved.

    Args:
      question: With its worked solution; without one only the answer is told.
      mistake: A wrong solution whose first wrong step is to be named, or None.
      wrong: Whether to arrive at a wrong answer.
      way: Which of the `NUM_WORDINGS` wordings. Four in a row differ in every part.
      seed: Decides how a wrong telling goes wrong.

    Returns:
      The steps, a tip about the mistake, and the answer: on a line `Answer: 8` of its own, but
      for choices as `Therefore, the answer is blotter (e).`

    Example:
      >>> tom = Question("a/1", "How many?", "8", "train", "numeric", solution="Tom has 5 + 3 = 8.")
      >>> print(explain(tom, mistake="Tom has 5 + 3 = 9.", wrong=False, way=1, seed=""))
      First, Tom has 5 + 3 = 8. The first wrong step was 5 + 3 = 9. So, the answer is 8.
      Answer: 8
    """
    told = _steps(question.solution), question.answer
    if wrong:
        told = _spoil(question, told[0], Random(seed))
    return _tell(question, *told, tip=_tip(question, mistake), way=way)


def tellings(question: Question, *, mistake: str | None, wrong: float) -> list[tuple[str, float]]:
    """All that `explain` may say of a question, each with its probability.

    All wordings are equally likely, and so are all ways to go wrong.

    Args:
      question, mistake: As for `explain`.
      wrong: How likely a wrong answer is.

    Example:
      >>> tom = Question("a/1", "How many?", "8", "train", "numeric", solution="Tom has 5 + 3 = 8.")
      >>> told = tellings(tom, mistake=None, wrong=0.1)
      >>> len(told) == 6 * NUM_WORDINGS, round(sum(share for _, share in told), 9)
      (True, 1.0)
    """
    steps, tip = _steps(question.solution), _tip(question, mistake)
    spoiled = _ways_to_spoil(question, steps) if wrong else []
    stories = [((steps, question.answer), 1.0 - wrong)]
    stories += [(told, wrong / len(spoiled)) for told in spoiled]
    return [
        (_tell(question, *told, tip=tip, way=way), share / NUM_WORDINGS)
        for told, share in stories
        if share
        for way in range(NUM_WORDINGS)
    ]


def _tell(question: Question, steps: Sequence[str], answer: str, *, tip: str, way: int) -> str:
    opening = OPENINGS[way % len(OPENINGS)]
    closing = CLOSINGS[(way + way // len(OPENINGS)) % len(CLOSINGS)]
    told = [_open(opening[index > 0], step) for index, step in enumerate(steps)]
    if question.kind == "choice":
        closing = CLOSINGS[-1]
        named = f"{question.choices[ascii_lowercase.index(answer)]} ({answer})"
        return " ".join([*told, *filter(None, [tip]), closing.format(answer=named)])
    if closing == CLOSINGS[0] and steps and not tip:
        closing = ""
    parts = [*told, tip, closing.format(answer=answer)]
    return f"{' '.join(part for part in parts if part)}\nAnswer: {answer}"


def first_wrong_step(mistake: str, solution: str) -> str | None:
    """The first equation of a mistake that is false, or that the solution doesn't have.

    Example:
      >>> first_wrong_step("3 + 5 = 8 eggs. 8 * 2 = 18 eggs.", "5 + 3 = 8. 8 * 2 = 16.")
      '8 * 2 = 18'
      >>> first_wrong_step("5 + 2 = 7.", "5 + 3 = 8."), first_wrong_step("Five.", "5 + 3 = 8.")
      ('5 + 2 = 7', None)
    """
    right = [equation.key for equation in _equations(solution)]
    for equation in _equations(mistake):
        if equation.value != equation.result or equation.key not in right:
            return mistake[equation.start : equation.right.stop]
    return None


def phrases() -> Iterator[str]:
    """All words that are not the solution's own, for a vocabulary that must know them."""
    yield from (opening for pair in OPENINGS for opening in pair if opening)
    yield from (template.format(answer="8") for template in (*CLOSINGS, WRONG_ANSWER))
    yield WRONG_STEP.format(step="5 + 3 = 9")


def _steps(solution: str) -> list[str]:
    """The solution's sentences, without the words that order them and without a conclusion."""
    steps = [
        _OPENED.sub("", sentence, count=1).strip()
        for line in solution.splitlines()
        for sentence in _SENTENCE_END.split(line.strip())
    ]
    return [step for step in steps if step and not _CONCLUSION.match(step)]


def _open(opening: str, step: str) -> str:
    if not opening:
        return step[0].upper() + step[1:]
    return opening + (step[0].lower() + step[1:] if _SMALL.match(step) else step)


def _tip(question: Question, mistake: str | None) -> str:
    """Names what the mistake got wrong: a step, or else its answer; nothing if it has neither."""
    if mistake is None:
        return ""
    step = first_wrong_step(mistake, question.solution)
    if step is not None:
        return WRONG_STEP.format(step=step)
    answer = read_answer(mistake, question.kind)
    if answer is None or same_answer(answer, question.answer, question.kind):
        return ""
    return WRONG_ANSWER.format(answer=f"({answer})" if question.kind == "choice" else answer)


def _equations(text: str) -> Iterator[Equation]:
    """The equations in a text; what can't be worked out is not one."""
    for match in _EQUATION.finditer(text):
        left, value = match["left"], _work_out(match["left"])
        if value is not None:
            result = Fraction(match["result"].replace(",", ""))
            yield Equation(match.start(), left, slice(*match.span("result")), value, result)


def _work_out(left: str) -> Fraction | None:
    try:
        return tell_equation(left.translate(_PLAIN))[1]
    except (ValueError, ZeroDivisionError):  # unbalanced brackets, `5 / 0`
        return None


def _numbers(text: str) -> Iterator[Fraction]:
    return (Fraction(number.replace(",", "")) for number in re.findall(_DIGITS, text))


Spoiled = tuple[list[str], str]
"""Steps that go wrong somewhere, and the wrong answer in which they end."""


def _spoil(question: Question, steps: Sequence[str], random: Random) -> Spoiled:
    """One of the ways to go wrong."""
    if question.kind != "numeric":
        return random.choice(_ways_to_spoil(question, steps))
    text, answer = "\n".join(steps), question.answer
    slips = _slips(text)
    random.shuffle(slips)
    found = next(filter(None, (_slip(text, answer, *slip) for slip in slips)), None)
    return found or _misread(text, answer, random.choice(_MISREADINGS))


def _ways_to_spoil(question: Question, steps: Sequence[str]) -> list[Spoiled]:
    if question.kind == "yes_no":
        other = "No" if read_answer(question.answer, "yes_no") == "Yes" else "Yes"
        return [(list(steps), other)]
    if question.kind == "text":
        return [(list(steps), f"not {question.answer}")]
    if question.kind == "choice":
        right, texts = ascii_lowercase.index(question.answer), question.choices
        return [
            ([step.replace(texts[right], text) for step in steps], ascii_lowercase[wrong])
            for wrong, text in enumerate(texts)
            if wrong != right
        ]
    text, answer = "\n".join(steps), question.answer
    found = [way for slip in _slips(text) if (way := _slip(text, answer, *slip))]
    return found or [_misread(text, answer, slip) for slip in _MISREADINGS]


def _slips(text: str) -> list[tuple[Equation, int]]:
    return [(equation, slip) for equation in _equations(text) for slip in _SLIPS]


def _slip(text: str, answer: str, equation: Equation, slip: int) -> Spoiled | None:
    """What one wrong result leads to; None if that is no plain number, or right after all."""
    gold = _read(answer)
    told, changed = _carry(text, equation, equation.result + slip)
    plain = all(value > 0 and "/" not in write_number(value) for value in changed.values())
    end = write_number(changed.get(gold, gold))
    return (told.splitlines(), end) if plain and not same_answer(end, answer, "numeric") else None


def _misread(text: str, answer: str, slip: int) -> Spoiled:
    """Another answer where no calculation leads to it."""
    wrong = _read(answer) + slip
    return _replace(text, {_read(answer): wrong}).splitlines(), write_number(wrong)


def _read(answer: str) -> Fraction:
    read = read_answer(answer, "numeric")
    assert read is not None, f"a gold answer that can't be read: {answer!r}"
    return Fraction(read)


def _carry(text: str, slip: Equation, result: Fraction) -> tuple[str, dict[Fraction, Fraction]]:
    """The text with another result for one equation, and all that follows from it.

    Returns:
      The text, and the new value of each number that is another one at its end.
    """
    changed = {slip.result: result}
    told = text[: slip.right.start] + write_number(result)
    position = slip.right.stop
    for equation in _equations(text):
        if equation.start < slip.right.stop:
            continue
        told += _replace(text[position : equation.right.start], changed)
        value = _work_out(_replace(equation.left, changed))
        changed.pop(equation.result, None)
        if value is not None and value != equation.value:
            changed[equation.result] = value
        told += write_number(changed.get(equation.result, equation.result))
        position = equation.right.stop
    return told + _replace(text[position:], changed), changed


def _replace(text: str, changed: Mapping[Fraction, Fraction]) -> str:
    """The text with other numbers."""

    def number(match: re.Match[str]) -> str:
        old = Fraction(match[0].replace(",", ""))
        return write_number(changed[old]) if old in changed else match[0]

    return _NUMBER.sub(number, text)
