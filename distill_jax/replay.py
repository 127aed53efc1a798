"""A run's lessons, read again from its ledger: what would be kept with today's answer reader."""

from collections import Counter
from pathlib import Path
from typing import Any

from distill_jax.config import ConfigError
from distill_jax.config_file import load_config
from distill_jax.records import Attempt, Question, Rationale, to_json
from distill_jax.run_folder import read_records, write_rows
from distill_jax.teaching import asks_teacher, replay


def replay_run(folder: Path, *, to: Path | None = None) -> dict[str, Any]:
    """Reads every finished lesson of a run anew. Asks nothing, costs nothing.

    The run itself stays as it is. To train on what is kept now, delete `lesson.jsonl` of a round
    and what comes after it, and run its config again: the ledger is read in place of the teacher.

    Args:
      folder: The run.
      to: A JSONL file for the rows as read now.

    Returns:
      `run` and `rounds`: for each its number, the verdicts `then` and `now`, and how many rows
      have `changed`.

    Raises:
      ConfigError: there is no run, or no teacher was asked in it.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds no run: a run folder has a config.yaml.")
    config = load_config(folder / "config.yaml")
    if not asks_teacher(config):
        raise ConfigError(f"{folder} asked no teacher: there are no answers to read again.")
    questions = read_records(folder / "questions.jsonl", Question)
    train = [question for question in questions if question.split == "train"]
    rounds, rows = [], []
    for path in sorted(folder.glob("round_*/lesson.jsonl")):
        index = int(path.parent.name.removeprefix("round_"))
        attempts = read_records(path.parent / "exam.jsonl", Attempt)
        then = read_records(path, Rationale)
        now = replay(config, folder, train, attempts, round_index=index).rows
        rows += now
        rounds.append(
            {
                "round": index,
                "then": dict(Counter(row.verdict for row in then)),
                "now": dict(Counter(row.verdict for row in now)),
                "changed": len(set(now) - set(then)),
            }
        )
    if to is not None:
        write_rows(to, map(to_json, rows))
    return {"run": str(folder), "rounds": rounds}
