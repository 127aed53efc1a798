"""Where a run stands, read off the files that are there and those that are missing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill_jax.config import SCRATCH, Config
from distill_jax.report.files import read_stage, round_folders
from distill_jax.run_folder import read_json

STAGES = {"exam": "exam", "lesson": "teaching", "metrics": "training", "dev": "dev exam"}
"""A round's stages in order: the file that each leaves, and what it is called."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What a run is doing now, or would do next.

    Attributes:
      name: `pretraining`, `exam`, `teaching`, `training`, `dev exam`, `test exam` or `done`.
      round_index: The round that it belongs to; of `test exam` and `done`, the last one.
      num_done: Questions answered or steps taken in this phase so far.
      num_total: Out of how many, or 0 where the folder doesn't say.
    """

    name: str
    round_index: int
    num_done: int = 0
    num_total: int = 0


def read_phase(folder: Path, config: Config, num_questions: Mapping[str, int]) -> Phase:
    """The phase of the run in `folder`.

    Args:
      folder: The run folder.
      config: The run's settings.
      num_questions: By split.
    """
    rounds = round_folders(folder)
    last = max(rounds, default=0)
    if (folder / "result.json").exists():
        return Phase("done", last)
    stages = _missing_stages(folder, rounds, config)
    tests = [read_stage(path, "test", dict) for path in rounds.values()]
    if any(tests) or (last == config.rounds.max and not stages):
        sat = sum(len(stage.rows) for stage in tests if stage)
        return Phase("test exam", last, sat, 2 * num_questions.get("test", 0))
    if not stages:
        return Phase("exam", last + 1, 0, num_questions.get("train", 0))
    name, label = next(iter(stages.items()))
    if not rounds:
        return Phase(label, 0)
    stage = read_stage(rounds[last], name, dict)
    done, total = _progress(name, stage.rows if stage else (), num_questions)
    if name == "metrics":
        total = read_json(rounds[last] / "round.json").get("steps", 0)
    return Phase(label, last, done, total)


def _missing_stages(folder: Path, rounds: Mapping[int, Path], config: Config) -> dict[str, str]:
    """The stages of the newest round that have not finished, in order."""
    last = max(rounds, default=0)
    stages = STAGES if last else {"dev": STAGES["dev"]}
    path = rounds.get(last, folder)
    if not last and config.student.model == SCRATCH and not (path / "student").exists():
        stages = {"metrics": "pretraining", **stages}
    return {file: name for file, name in stages.items() if not (path / f"{file}.jsonl").exists()}


def _progress(
    name: str, rows: tuple[dict, ...], num_questions: Mapping[str, int]
) -> tuple[int, int]:
    """How much of a stage is done, and out of how much; 0 where that can't be told."""
    if name == "metrics":
        return len(rows), 0
    done = len({row["question_id"] for row in rows})
    return done, num_questions.get({"exam": "train", "dev": "dev"}.get(name, ""), 0)
