"""The questions of a run: published sets, a user's own file, or built-in arithmetic."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from distill_jax.config import TaskConfig
from distill_jax.questions.arithmetic import make_questions
from distill_jax.questions.own_file import read_own_file
from distill_jax.questions.raw_files import QuestionsError
from distill_jax.records import Question

__all__ = ["QuestionsError", "default_data_dir", "load_questions", "prepare"]


def default_data_dir() -> Path:
    """Where prepared sets lie: `$DISTILL_JAX_DATA`, or `~/.cache/distill_jax/questions`."""
    folder = os.environ.get("DISTILL_JAX_DATA")
    return Path(folder) if folder else Path.home() / ".cache" / "distill_jax" / "questions"


def prepare(
    name: str, *, split: str = "ho2023", data_dir: Path, source: Path | None = None
) -> dict[str, int]:
    """Makes a published question set ready to be read.

    Whole or not at all: an interrupted preparation leaves nothing that is taken for a set. Doing
    it again costs nothing, and several processes may do it at the same time.

    Args:
      name: `gsm8k`, `multiarith`, `svamp`, `csqa` or `strategyqa`.
      split: `ho2023`, or `chilled` where that exists (multiarith, svamp, strategyqa), which is
        read from `train.json` and `test.json` (or `.jsonl`) of the Hugging Face sets `ChilleD/...`.
      data_dir: Where prepared sets lie, such as `default_data_dir()`.
      source: A folder that holds the raw files, or holds folders that hold them; None downloads
        them. Published files must have the published checksum either way.

    Returns:
      Questions by split: `train`, `test`, and `left_out` for test rows that are also
      demonstrations of the prompt (two in strategyqa); those are in no exam.

    Raises:
      QuestionsError: no such set; a file is missing, has the wrong checksum or unreadable rows; no
        network, within seconds; or the set was prepared from other files before.
    """
    # imported late: TFDS takes half a second, and runs on arithmetic do without
    from distill_jax.questions import prepared

    return prepared.prepare(name, split=split, data_dir=data_dir, source=source)


def load_questions(task: TaskConfig, *, seed: int, data_dir: Path) -> list[Question]:
    """Loads the questions of a run.

    Args:
      task: Which ones. `num_train` and `num_test` keep the first ones in file order (they are how
        many arithmetic makes); dev is carved out of what `num_train` keeps.
      seed: Decides which train questions become dev, and which questions arithmetic makes.
      data_dir: Where prepared sets lie. A set that is not there is downloaded and prepared.

    Returns:
      Train, dev, test; each in file order. Dev is `task.dev_fraction` of the distinct texts of
      train, rounded, but at least one and not all; train questions that repeat a text are on the
      same side. A user's file that has dev rows of its own keeps those and nothing is carved.

    Raises:
      QuestionsError: the set can't be prepared, or the user's file has a malformed line or lacks
        the test rows that `num_test` asks for.
      ValueError: arithmetic can't make that many different questions.

    Example:
      >>> task = TaskConfig(name="arithmetic", num_train=20, num_test=3)
      >>> [q.split for q in load_questions(task, seed=1, data_dir=Path())[17:]]
      ['train', 'dev', 'dev', 'test', 'test', 'test']
    """
    questions = _read(task, seed=seed, data_dir=data_dir)
    splits = {
        split: [q for q in questions if q.split == split] for split in ("train", "dev", "test")
    }
    if task.num_test and not splits["test"]:
        raise QuestionsError(
            f"task.num_test asks for {task.num_test} test questions and {task.name} has none: "
            'give some rows "split": "test", or leave task.num_test out.'
        )
    train = splits["train"][: task.num_train or None]
    dev = splits["dev"]
    if not dev:
        train, dev = carve_dev(train, fraction=task.dev_fraction, seed=seed)
    return [*train, *dev, *splits["test"][: task.num_test or None]]


def carve_dev(
    train: list[Question], *, fraction: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Splits train questions into train and dev, as `load_questions` describes."""
    texts = list(dict.fromkeys(question.text for question in train))
    if not fraction or len(texts) < 2:
        return train, []
    num_dev = min(max(1, round(fraction * len(texts))), len(texts) - 1)
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out = {texts[i] for i in order[:num_dev]}
    dev = [dataclasses.replace(q, split="dev") for q in train if q.text in held_out]
    return [q for q in train if q.text not in held_out], dev


def _read(task: TaskConfig, *, seed: int, data_dir: Path) -> list[Question]:
    if task.name == "arithmetic":
        steps, max_value = task.arithmetic
        return make_questions(
            num_train=task.num_train,
            num_test=task.num_test,
            steps=steps,
            max_value=max_value,
            seed=seed,
        )
    if task.name.endswith(".jsonl"):
        return read_own_file(Path(task.name))
    from distill_jax.questions import prepared  # imported late, as in `prepare`

    return prepared.read_prepared(task.name, split=task.split, data_dir=data_dir)
