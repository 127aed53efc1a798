"""Finished runs as the rows of a comparison: runs that differ in nothing but their seed are one."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.analysis.paired import accuracy_interval
from distill_jax.config import Config, knobs
from distill_jax.config_file import load_config
from distill_jax.records import Attempt, Question, Rationale, Split
from distill_jax.report.files import round_folders
from distill_jax.report.marks import greedy, mark
from distill_jax.report.published import published_accuracy, published_row
from distill_jax.report.summary import row_name
from distill_jax.run_folder import FREE_TO_CHANGE, read_json, read_records, read_round
from distill_jax.syllabus import read_sources


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
      folder: Where it lies.
      config: Its settings.
      chosen_round: The round whose student is the result.
      steps: Updates by round, from 1.
      requests: Questions that the teacher was asked about, and rationales that it judged, by round.
      answers: Answers that it was asked for, by round.
      marks: Right or wrong, by question, of the chosen student.
      groups: The kind of each question, by question.
      original: The share that is right by the original code's rule.
    """

    folder: Path
    config: Config
    chosen_round: int
    steps: tuple[int, ...]
    requests: tuple[int, ...]
    answers: tuple[int, ...]
    marks: Mapping[str, bool]
    groups: Mapping[str, str]
    original: float

    @property
    def accuracy(self) -> float:
        return sum(self.marks.values()) / len(self.marks)


@dataclass(frozen=True)
class Row:
    """Runs of one config, by seed.

    Attributes:
      name: What the folders are called, without the seed.
      runs: At least one, in order of their seeds.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def accuracy(self) -> float:
        """The mean over seeds."""
        return float(np.mean([run.accuracy for run in self.runs]))

    @property
    def original(self) -> float:
        """The mean share that is right by the original code's rule."""
        return float(np.mean([run.original for run in self.runs]))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `accuracy`."""
        return accuracy_interval([run.marks for run in self.runs])

    @property
    def steps(self) -> float:
        """Updates of all rounds, the mean over seeds."""
        return float(np.mean([sum(run.steps) for run in self.runs]))

    @property
    def chosen_steps(self) -> float:
        """Updates of the rounds up to the chosen one, the mean over seeds."""
        return float(np.mean([sum(run.steps[: run.chosen_round]) for run in self.runs]))

    @property
    def requests(self) -> float:
        """What the teacher was asked to explain or to judge, the mean over seeds."""
        return float(np.mean([sum(run.requests) for run in self.runs]))

    @property
    def answers(self) -> float:
        """Answers that the teacher was asked for, the mean over seeds."""
        return float(np.mean([sum(run.answers) for run in self.runs]))

    @property
    def paper(self) -> float | None:
        """The paper's accuracy of the row of this name, in percent; None if it has none."""
        return published_accuracy(published_row(self.name), self.config.task.name)


def read_run(folder: Path, split: Split = "test") -> Run:
    """Reads a finished run.

    Args:
      folder: Where it lies.
      split: The exam whose marks count: `test`, or `dev`, which also chose the round.

    Raises:
      ValueError: there is no run, it has not ended, or it has sat no such exam.
    """
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds no run: a run folder has a config.yaml.")
    result = read_json(folder / "result.json")
    if not result:
        raise ValueError(
            f"{folder} has not ended; go on with distill-jax run {folder / 'config.yaml'}."
        )
    chosen = result["chosen_round"]
    questions = {row.id: row for row in read_records(folder / "questions.jsonl", Question)}
    path = folder / f"round_{chosen:02d}" / f"{split}.jsonl"
    attempts = greedy(read_records(path, Attempt)) if path.exists() else []
    if not attempts:
        raise ValueError(f"{folder} has no {split} exam of round {chosen}: there is no {path}.")
    later = [(index, place) for index, place in round_folders(folder).items() if index]
    # without a ledger nobody outside was asked: the lessons are the student's own
    asked = (folder / "ledger.sqlite").exists()
    lessons = [_read_lesson(place) if asked else [] for _, place in later]
    config = load_config(folder / "config.yaml")
    keys = {
        attempt.question_id: question_key(questions[attempt.question_id]) for attempt in attempts
    }
    return Run(
        folder=folder,
        config=config,
        chosen_round=chosen,
        steps=tuple(read_round(folder, index).get("steps", 0) for index, _ in later),
        requests=tuple(
            len({row.question_id for row in lesson}) + _count_judged(config, place)
            for lesson, (_, place) in zip(lessons, later, strict=True)
        ),
        answers=tuple(map(len, lessons)),
        marks={keys[attempt.question_id]: attempt.correct for attempt in attempts},
        groups={key: questions[name].group for name, key in keys.items()},
        original=mark(attempts, questions).original_accuracy or 0.0,
    )


def _read_lesson(folder: Path) -> list[Rationale]:
    path = folder / "lesson.jsonl"
    return read_records(path, Rationale) if path.exists() else []


def _count_judged(config: Config, folder: Path) -> int:
    """Rationales of a round that the teacher was asked to judge; equal ones are asked once."""
    if not (folder / "judged.jsonl").exists():
        return 0
    return len({(row.question_id, row.text) for row in read_sources(config, folder)})


def question_key(question: Question) -> str:
    """The same for the same question, whatever run it is in; arithmetic's depend on the seed."""
    return f"{question.id}\n{question.text}"


def pool(runs: Sequence[Run]) -> list[Row]:
    """The rows that runs make, in the order given.

    Raises:
      ValueError: a run is given twice, or as a copy with the same seed.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(identity(run.config), []).append(run)
    return [_make_row(row) for row in found.values()]


def _make_row(runs: list[Run]) -> Row:
    ordered = sorted(runs, key=lambda run: run.config.seed)
    for one, other in itertools.pairwise(ordered):
        if one.config.seed == other.config.seed:
            raise ValueError(
                f"{one.folder} and {other.folder} have the same settings and the same seed; "
                "give one of them."
            )
    return Row(row_name(runs[0].folder), tuple(ordered))


def identity(config: Config, *, besides: Sequence[str] = ()) -> str:
    """All settings but the seed, those that change no record, and those named in `besides`."""
    free = {"seed", *FREE_TO_CHANGE, *besides}
    return json.dumps([_show(config, name) for name in knobs() if name not in free])


def _show(config: Config, name: str) -> str:
    """A setting as rows are told apart by it.

    Students that were pretrained once per seed, as `runs/lab/3/pretrained`, are one setting.
    """
    value = str(reduce(getattr, name.split("."), config))
    if name != "student.model":
        return value
    seed = str(config.seed)
    return "/".join("SEED" if part == seed else part for part in value.split("/"))


def pair_runs(before: Row, after: Row) -> list[tuple[Run, Run]]:
    """Runs of two rows with the same seed; in order of their seeds where none is the same."""
    same = sorted(set(before.seeds) & set(after.seeds))
    if not same:
        return list(zip(before.runs, after.runs, strict=False))
    by_seed = [{run.config.seed: run for run in row.runs} for row in (before, after)]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in same]


def differing_knobs(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The settings that are not the same in all rows: by name, the value in each."""
    free: set[Any] = {"seed", *FREE_TO_CHANGE}
    values = {
        name: [_show(row.config, name) for row in rows] for name in knobs() if name not in free
    }
    return {name: each for name, each in values.items() if len(set(each)) > 1}
