"""How a raw row of each published set becomes the text, answer and solution of a question."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from distill_jax.questions.equations import name_operations, tell_equation, write_number

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """What a row says; which question it becomes (id, split) is decided by where it stands."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()
    solution: str = ""
    group: str = ""


def parse_gsm8k(row: Row) -> Item:
    """Drops the calculator marks; a rationale that does not end in the answer is told it."""
    rationale, gold = row["answer"].split("#### ")
    lines = re.sub(r"<<[^<>]*>>", "", rationale).split("\n")
    steps = [_sentence(line.strip()) for line in lines if line.strip()]
    group = f"{len(steps)} steps"
    answer = gold.strip().lower()
    if _last_number("\n".join(steps)) != Fraction(answer.replace(",", "")):
        steps.append(f"So, the answer is {answer}.")
    return Item(row["question"].strip(), answer, solution="\n".join(steps), group=group)


def parse_multiarith(row: Row) -> Item:
    """Texts lose the spaces around them; the equation becomes the solution."""
    (equation,), (gold,) = row["lEquations"], row["lSolutions"]
    return Item(
        row["sQuestion"].strip(),
        _integer(gold),
        solution=_told(equation, gold),
        group=name_operations(equation),
    )


def parse_svamp(row: Row) -> Item:
    """Bodies without a full stop get one; the equation, where there is one, becomes the solution.

    An equation that contradicts the gold answer (chal-680) is not told.
    """
    body = row["Body"].strip()
    text = f"{body if body.endswith('.') else f'{body}.'} {row['Question'].strip()}"
    solution = _told(row["Equation"], row["Answer"]) if "Equation" in row else ""
    group = row.get("Type", "").lower().replace("divison", "division")  # misspelt in one row
    return Item(text, _integer(row["Answer"]), solution=solution, group=group)


def parse_csqa(row: Row) -> Item:
    """No rationale is published; the solution is a plain one that names the right choice."""
    letter = row["answerKey"].lower()
    choices = tuple(choice["text"].strip() for choice in row["question"]["choices"])
    answer = choices["abcde".index(letter)]
    solution = (
        f"The question is about {row['question']['question_concept'].strip()}. "
        f"Of the choices, {answer} fits best. Therefore, the answer is {answer} ({letter})."
    )
    return Item(row["question"]["stem"].strip(), letter, choices, solution)


def parse_strategyqa(row: Row) -> Item:
    """BIG-bench's form: the facts follow the answer in `target`."""
    answer = max(row["target_scores"], key=row["target_scores"].get)
    facts = row["target"].removeprefix(f"{answer}. ")
    return Item(row["input"].strip(), answer, solution=_concluded(facts, answer))


def parse_chilled_multiarith(row: Row) -> Item:
    """`ChilleD/MultiArith`: `question` and `final_ans`; it has no equations, so no solution."""
    return Item(row["question"].strip(), _integer(row["final_ans"]))


def parse_chilled_strategyqa(row: Row) -> Item:
    """`ChilleD/StrategyQA`: `question`, `answer` (a boolean) and `facts`, one text or several."""
    if not isinstance(row["answer"], bool):
        raise ValueError("answer must be true or false")
    answer = "Yes" if row["answer"] else "No"
    facts = row["facts"] if isinstance(row["facts"], str) else " ".join(row["facts"])
    return Item(row["question"].strip(), answer, solution=_concluded(facts, answer))


def _told(equation: str, gold: Any) -> str:
    """The equation's story; none if it does not lead to the gold answer."""
    story, value = tell_equation(equation)
    return story if value == Fraction(str(gold)) else ""


def _concluded(facts: str, answer: str) -> str:
    facts = " ".join(facts.split())
    return f"{_sentence(facts)} So, the answer is {answer}." if facts else ""


def _sentence(text: str) -> str:
    """Ends with a full stop what has no end, so that sentences stay apart in one line."""
    return text if text.endswith((".", "!", "?", ":", ";")) else f"{text}."


def _integer(value: Any) -> str:
    """A gold number that the file may hold as text or with a decimal point, without one."""
    return write_number(Fraction(str(value)))


def _last_number(text: str) -> Fraction | None:
    numbers = re.findall(r"-?(?:\d[\d,]*)?\.?\d+", text)
    return Fraction(numbers[-1].replace(",", "")) if numbers else None
