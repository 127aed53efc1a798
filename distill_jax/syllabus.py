"""What a round is trained on: where its rationales come from, and which are left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_jax.config import Config
from distill_jax.contamination import ExamTexts
from distill_jax.prompts import clean_rationale
from distill_jax.records import Attempt, Lesson, Question, Rationale
from distill_jax.run_folder import read_records, round_folder
from distill_jax.teaching import wants_rationales


@dataclass(frozen=True, slots=True)
class Syllabus:
    """What a round is trained on.

    Attributes:
      rationales: To train on, each text once. Where only bare answers are learnt, one without a
        text for every training question.
      left_out: How many were not approved (`doubted`) or hold a test question, if any were.
    """

    rationales: Sequence[Rationale]
    left_out: Mapping[str, int]


def choose(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    exam_texts: ExamTexts,
    *,
    round_index: int,
) -> Syllabus:
    """Collects a round's rationales from the files of the rounds that `train.rows` names.

    Args:
      config: The run's settings.
      folder: The run, with this round's lesson finished.
      questions: All training questions.
      exam_texts: Of the test questions: a rationale that holds one is left out.
      round_index: From 1.
    """
    if not wants_rationales(config):
        gold = [Rationale(q.id, round_index, 0, "", q.answer, "kept") for q in questions]
        return Syllabus(gold, {})
    sources = config.train.rows
    found: dict[tuple[str, str], Rationale] = {}
    approved: set[tuple[str, str]] = set()
    for index in range(1 if "old" in sources else round_index, round_index + 1):
        path = round_folder(folder, index)
        for row in read_sources(config, path, old=index < round_index):
            found.setdefault((row.question_id, row.text), row)
        if "judged" in sources:
            judged = read_records(path / "judged.jsonl", Rationale)
            approved |= {(row.question_id, row.text) for row in judged}
    rows = [row for key, row in found.items() if "judged" not in sources or key in approved]
    clean = [row for row in rows if exam_texts.find(row.text) is None]
    counts = {"doubted": len(found) - len(rows), "test_question": len(rows) - len(clean)}
    return Syllabus(clean, {reason: number for reason, number in counts.items() if number})


def read_sources(config: Config, path: Path, *, old: bool = False) -> list[Rationale]:
    """The rationales of one round that may be trained on.

    Args:
      config: The run's settings.
      path: The round's folder, with its lesson and exam finished.
      old: Whether the round is an earlier one, whose lesson counts though new ones don't.
    """
    rows: list[Rationale] = []
    if old or "new" in config.train.rows:
        rows += Lesson(tuple(read_records(path / "lesson.jsonl", Rationale))).kept
    if "own" in config.train.rows:
        rows += own_rationales(read_records(path / "exam.jsonl", Attempt))
    return rows


def own_rationales(attempts: Sequence[Attempt]) -> list[Rationale]:
    """The student's right answers at an exam as rationales to train on; empty ones left out.

    Example:
      >>> right = Attempt("t/1", 0, 2, " 3 + 4 = 7.\\nAnswer: 7", "7", True, False, 9)
      >>> own_rationales([right])[0].text
      '3 + 4 = 7.'
    """
    rows = [
        Rationale(
            attempt.question_id,
            attempt.round_index + 1,  # the round that the exam opens
            attempt.sample_index,
            clean_rationale(attempt.text),
            attempt.answer,
            "kept",
        )
        for attempt in attempts
        if attempt.correct and not attempt.cut
    ]
    return [row for row in rows if row.text]
