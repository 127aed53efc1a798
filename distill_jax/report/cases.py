"""Mistakes one by one: what the student said, what the teacher said, what the student said next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_jax.records import Attempt, Question, Rationale
from distill_jax.report.files import finished_rows, round_folders
from distill_jax.report.marks import greedy

CASES_PER_ROUND = 60
MAX_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Case:
    """One mistake of the exam that opened a round, and what became of it.

    Attributes:
      question: What was asked.
      mistake: The student's wrong greedy answer.
      rationales: The teacher's answers, in the order asked; none if it was not asked.
      following: The student's greedy answer to the same question after the round, or None if it
        has not sat another exam on the training questions.
    """

    question: Question
    mistake: Attempt
    rationales: tuple[Rationale, ...]
    following: Attempt | None


@dataclass(frozen=True, slots=True)
class RoundCases:
    """The cases of a round: some of `num_mistakes`, evenly spaced in question order."""

    round_index: int
    num_mistakes: int
    num_corrected: int | None  # mistakes answered right after the round; None if not sat again
    cases: tuple[Case, ...]


def read_cases(folder: Path, questions: dict[str, Question]) -> list[RoundCases]:
    """The mistakes of every finished exam on the training questions.

    Args:
      folder: The run folder.
      questions: The run's questions by id.
    """
    rounds = round_folders(folder)
    found = []
    for index, path in rounds.items():
        mistakes = [a for a in greedy(finished_rows(path, "exam", Attempt)) if not a.correct]
        if not mistakes:
            continue
        shown = {each.question_id: each for each in evenly(mistakes, CASES_PER_ROUND)}
        rationales: dict[str, list[Rationale]] = {id: [] for id in shown}
        for row in finished_rows(path, "lesson", Rationale):
            if row.question_id in shown:
                rationales[row.question_id].append(row)
        wrong, right = {each.question_id for each in mistakes}, 0
        following: dict[str, Attempt] = {}
        sat = False
        for attempt in greedy(finished_rows(rounds.get(index + 1, path / "-"), "exam", Attempt)):
            sat = True
            right += attempt.correct and attempt.question_id in wrong
            if attempt.question_id in shown:
                following[attempt.question_id] = attempt
        cases = tuple(
            Case(questions[id], mistake, tuple(rationales[id]), following.get(id))
            for id, mistake in shown.items()
        )
        found.append(RoundCases(index, len(mistakes), right if sat else None, cases))
    return found


def evenly(rows: Sequence, number: int) -> list:
    """At most `number` of the rows, evenly spaced, in order.

    Example:
      >>> evenly("abcdefgh", 4)
      ['a', 'c', 'e', 'g']
    """
    number = min(number, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]


def shorten(text: str) -> str:
    """The text, or its beginning and how much was left out."""
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]} ... ({left:,} more characters)"
