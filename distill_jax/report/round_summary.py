"""One round in numbers: the exam that opens it, the lesson, the training, the exam that ends it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from distill_jax.records import GREEDY, Attempt, Question, Rationale, Verdict
from distill_jax.report.files import finished_rows, round_folders
from distill_jax.report.marks import Change, Marks, compare, greedy, mark, mark_groups
from distill_jax.run_folder import read_json

VERDICTS: tuple[str, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Exam:
    """A finished exam on held-out questions: all of them, and by group."""

    marks: Marks
    groups: Mapping[str, Marks]


@dataclass(frozen=True, slots=True)
class LessonCounts:
    """What one round of teaching gave, counted.

    Attributes:
      num_questions: Questions that the teacher was asked about.
      num_taught: Those of them with at least one kept rationale.
      verdicts: Answers by verdict, all verdicts, zeros included. They sum to the answers asked.
    """

    num_questions: int
    num_taught: int
    verdicts: Mapping[str, int]

    @property
    def num_asked(self) -> int:
        """Answers asked of the teacher."""
        return sum(self.verdicts.values())

    @property
    def num_answered(self) -> int:
        """Answers that came."""
        return self.num_asked - self.verdicts["failed"]

    @property
    def num_kept(self) -> int:
        return self.verdicts["kept"]


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One round; what has not finished yet is None or empty.

    Attributes:
      round_index: 0 is the untrained student.
      exam: Greedy answers to the training questions by the weights that *enter* the round.
      num_exam_rows: Attempts in that exam, samples included.
      num_wrong_samples: Wrong ones among the samples.
      lesson: What the teacher gave.
      rows: Rationales trained on.
      pairs: Rows that had both a positive and a negative to reflect on.
      target_tokens: Tokens to be written, over all rows.
      soft_tokens: Those of them that share their place with what else the teacher found likely.
      steps: Updates.
      dropped_rows: Rationales that were kept but not trained on, by reason.
      seconds: By stage, over all interruptions.
      dev: Answers to the dev questions by the weights that *leave* the round.
      change: What changed on dev since the round before.
    """

    round_index: int
    exam: Marks | None
    num_exam_rows: int
    num_wrong_samples: int
    lesson: LessonCounts | None
    rows: int | None
    pairs: int | None
    target_tokens: int | None
    soft_tokens: int | None
    steps: int | None
    dropped_rows: Mapping[str, int]
    seconds: Mapping[str, float | int]
    dev: Exam | None
    change: Change | None

    @property
    def dev_accuracy(self) -> float | None:
        return self.dev.marks.accuracy if self.dev else None

    @property
    def train_error_rate(self) -> float | None:
        return self.exam.error_rate if self.exam else None

    @property
    def total_seconds(self) -> float:
        return float(sum(self.seconds.values()))


def read_rounds(folder: Path, questions: Mapping[str, Question]) -> tuple[RoundSummary, ...]:
    """The rounds that have begun, in order."""
    rounds = []
    dev_before: list[Attempt] = []
    for index, path in round_folders(folder).items():
        attempts: Counter[tuple[bool, bool]] = Counter()
        exam = greedy(_counted(finished_rows(path, "exam", Attempt), attempts))
        lesson = count_lesson(finished_rows(path, "lesson", Rationale))
        dev = greedy(finished_rows(path, "dev", Attempt))
        facts = read_json(path / "round.json")
        trained = facts if (path / "metrics.jsonl").exists() else {}  # until then they are plans
        rounds.append(
            RoundSummary(
                round_index=index,
                exam=mark(exam) if exam else None,
                num_exam_rows=attempts.total(),
                num_wrong_samples=attempts[False, False],
                lesson=lesson if lesson.num_asked else None,
                rows=trained.get("rows"),
                pairs=trained.get("pairs"),
                target_tokens=trained.get("target_tokens"),
                soft_tokens=trained.get("soft_tokens"),
                steps=trained.get("steps"),
                dropped_rows=trained.get("dropped_rows", {}),
                seconds=facts.get("seconds", {}),
                dev=summarise_exam(dev, questions) if dev else None,
                change=compare(dev_before, dev) if dev and dev_before else None,
            )
        )
        dev_before = dev
    return tuple(rounds)


def _counted(attempts: Iterable[Attempt], counts: Counter[tuple[bool, bool]]) -> Iterator[Attempt]:
    """The same attempts, while they are counted: by whether they are greedy, and right."""
    for attempt in attempts:
        counts[attempt.sample_index == GREEDY, attempt.correct] += 1
        yield attempt


def count_lesson(rows: Iterable[Rationale]) -> LessonCounts:
    """Counts the teacher's answers of one round."""
    verdicts: Counter[str] = Counter()
    asked: set[str] = set()
    taught: set[str] = set()
    for row in rows:
        verdicts[row.verdict] += 1
        asked.add(row.question_id)
        if row.verdict == "kept":
            taught.add(row.question_id)
    return LessonCounts(
        num_questions=len(asked),
        num_taught=len(taught),
        verdicts={verdict: verdicts[verdict] for verdict in VERDICTS},
    )


def summarise_exam(attempts: Sequence[Attempt], questions: Mapping[str, Question]) -> Exam:
    """Counts a finished exam on held-out questions."""
    if not questions:  # not written yet, or gone: neither groups nor texts to compare
        return Exam(mark(attempts), {})
    return Exam(mark(attempts, questions), mark_groups(attempts, questions))


def round_json(entry: RoundSummary) -> dict[str, Any]:
    """A round as a command prints it under `--json`."""
    lesson = entry.lesson
    return {
        "round": entry.round_index,
        "dev_accuracy": entry.dev_accuracy,
        "train_error_rate": entry.train_error_rate,
        "rows": entry.rows,
        "target_tokens": entry.target_tokens,
        "soft_tokens": entry.soft_tokens,
        "steps": entry.steps,
        "seconds": entry.total_seconds,
        "seconds_by_stage": dict(entry.seconds),
        "dev": exam_json(entry.dev) if entry.dev else None,
        "asked": lesson.num_asked if lesson else None,
        "answered": lesson.num_answered if lesson else None,
        "verdicts": dict(lesson.verdicts) if lesson else None,
    }


def exam_json(exam: Exam) -> dict[str, Any]:
    """An exam as a command prints it under `--json`."""
    marks = exam.marks
    return {
        "accuracy": marks.accuracy,
        "low": marks.interval[0],
        "high": marks.interval[1],
        "questions": marks.num_questions,
        "unreadable": marks.num_unreadable,
        "cut": marks.num_cut,
        "original_accuracy": marks.original_accuracy,
        "groups": {name: group.accuracy for name, group in exam.groups.items()},
    }
