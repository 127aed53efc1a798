"""One run in numbers, read from its folder at any moment of its life."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.config_file import load_config
from distill_jax.progress import one_line
from distill_jax.records import Attempt, Question
from distill_jax.report.files import finished_rows
from distill_jax.report.marks import Change, compare, greedy
from distill_jax.report.phase import Phase, read_phase
from distill_jax.report.published import published_row, published_words
from distill_jax.report.round_summary import (
    Exam,
    RoundSummary,
    exam_json,
    read_rounds,
    round_json,
    summarise_exam,
)
from distill_jax.run_folder import read_json
from distill_jax.teacher.audit import Totals, read_totals

_SEED = re.compile(r"(?:^|[-_, ])seed[=_-]?\d+")


@dataclass(frozen=True, slots=True)
class Summary:
    """A run.

    Attributes:
      folder: Where it lies.
      config: Its settings.
      manifest: What made it; empty if not written yet.
      phase: Where it stands.
      stop_reason: Why no further round was begun, or None.
      chosen_round: The round that is the result, or None.
      ledger: What was asked of the teacher and spent; None before the first request.
      num_questions: By split.
      rounds: Those that have begun, in order.
      test: The finished test exam by round: 0 and the chosen one.
      test_change: What changed on test from round 0 to the chosen one.
      problems: Sentences about counts that don't add up; empty in a sound run.
    """

    folder: Path
    config: Config
    manifest: Mapping[str, Any]
    phase: Phase
    stop_reason: str | None
    chosen_round: int | None
    ledger: Totals | None
    num_questions: Mapping[str, int]
    rounds: tuple[RoundSummary, ...]
    test: Mapping[int, Exam]
    test_change: Change | None
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def paper_words(self, round_index: int) -> str | None:
        """The paper's test accuracy after a round, in percent; None if it has no such number.

        The result is the row of its table 1 that the run is called after, on the same task; where
        that has a number, so has the untrained student.
        """
        row, task = published_row(row_name(self.folder)), self.config.task.name
        if self.chosen_round is None or not published_words(row, task):
            return None
        return published_words(row if round_index == self.chosen_round else "student", task)

    @property
    def spent_usd(self) -> float:
        """US dollars spent or possibly spent."""
        return self.ledger.spent_usd if self.ledger else 0.0

    @property
    def best_dev(self) -> RoundSummary | None:
        """The round with the best dev accuracy so far, the earliest of equals."""
        sat = [entry for entry in self.rounds if entry.dev_accuracy is not None]
        return max(sat, key=lambda entry: entry.dev_accuracy or 0.0, default=None)


def row_name(folder: Path) -> str:
    """What a run is called, without its seed.

    Example:
      >>> row_name(Path("runs/lab/one_round/seed=3")), row_name(Path("runs/quickstart-seed2"))
      ('one_round', 'quickstart')
      >>> row_name(Path("runs/weights/reflection.weight=0.5,seed=1"))
      'weights/reflection.weight=0.5'
    """
    path = folder.resolve()
    name = _SEED.sub("", path.name)
    if "=" in name or not name:
        name = f"{path.parent.name}/{name}".removesuffix("/")
    return one_line(name)


def summarise(folder: Path) -> Summary:
    """Reads a run folder, finished or not.

    Raises:
      ValueError: there is no run in `folder`, or a file in it can't be read.
    """
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds no run: a run folder has a config.yaml.")
    config = load_config(folder / "config.yaml")
    questions = read_questions(folder)
    result = read_json(folder / "result.json")
    ledger = folder / "ledger.sqlite"
    counts = Counter(question.split for question in questions.values())
    rounds = read_rounds(folder, questions)
    test = read_test(folder)
    first, *later = test.values() or [[]]
    return Summary(
        folder=folder,
        config=config,
        manifest=read_json(folder / "manifest.json"),
        phase=read_phase(folder, config, counts),
        stop_reason=result.get("stop_reason"),
        chosen_round=result.get("chosen_round"),
        ledger=read_totals(ledger) if ledger.exists() else None,
        num_questions=dict(counts),
        rounds=rounds,
        test={index: summarise_exam(rows, questions) for index, rows in test.items()},
        test_change=compare(first, later[-1]) if later else None,
        problems=tuple(_problems(rounds, counts["train"], config.exam.samples)),
    )


def read_questions(folder: Path) -> dict[str, Question]:
    """All questions of a run by id."""
    return {question.id: question for question in finished_rows(folder, "questions", Question)}


def read_test(folder: Path) -> dict[int, list[Attempt]]:
    """The greedy answers of the finished test exam, by the round whose weights gave them."""
    attempts = greedy(finished_rows(folder, "test", Attempt))
    indices = sorted({attempt.round_index for attempt in attempts})
    return {i: [attempt for attempt in attempts if attempt.round_index == i] for i in indices}


def _problems(rounds: Sequence[RoundSummary], num_train: int, samples: int) -> Iterator[str]:
    """Checks the equations that the counts of a sound run obey."""
    for entry in rounds:
        expected = num_train * (1 + samples)
        if entry.exam and entry.num_exam_rows != expected:
            yield (
                f"Round {entry.round_index}: {num_train:,} training questions with 1 greedy "
                f"answer and {samples} samples each make {expected:,} attempts; "
                f"exam.jsonl has {entry.num_exam_rows:,}."
            )


def status_json(summary: Summary) -> dict[str, Any]:
    """What `status --json` prints: numbers and short texts only, None for what is not known yet."""
    phase = summary.phase
    return {
        "run": str(summary.folder),
        "phase": phase.name,
        "round": phase.round_index,
        "done": phase.num_done,
        "total": phase.num_total,
        "stop_reason": summary.stop_reason,
        "chosen_round": summary.chosen_round,
        "spent_usd": summary.spent_usd,
        "budget_usd": summary.config.teacher.budget_usd,
        "rounds": [round_json(entry) for entry in summary.rounds],
        "test": [{"round": index, **exam_json(exam)} for index, exam in summary.test.items()],
        "problems": list(summary.problems),
    }
