"""Mistakes one by one: what the student said, what the teacher said, what the student said next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_jax.records import Attempt, Question, Rationale
from distill_jax.report.files import read_stage, round_folders
from distill_jax.report.marks import greedy
from distill_jax.report.round_summary import finished_rows

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
    exams = {
        index: greedy(finished_rows(read_stage(path, "exam", Attempt)))
        for index, path in rounds.items()
    }
    found = []
    for index, path in rounds.items():
        mistakes = [attempt for attempt in exams[index] if not attempt.correct]
        if not mistakes:
            continue
        lesson = finished_rows(read_stage(path, "lesson", Rationale))
        following = {attempt.question_id: attempt for attempt in exams.get(index + 1, ())}
        right = {key for key, attempt in following.items() if attempt.correct}
        rationales: dict[str, list[Rationale]] = {}
        for row in lesson:
            rationales.setdefault(row.question_id, []).append(row)
        cases = tuple(
            Case(
                question=questions[mistake.question_id],
                mistake=mistake,
                rationales=tuple(rationales.get(mistake.question_id, ())),
                following=following.get(mistake.question_id),
            )
            for mistake in evenly(mistakes, CASES_PER_ROUND)
        )
        corrected = sum(m.question_id in right for m in mistakes) if following else None
        found.append(RoundCases(index, len(mistakes), corrected, cases))
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
