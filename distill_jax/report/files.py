"""Reads the files of a run folder, whether the run has ended or is still writing them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from distill_jax.records import from_json
from distill_jax.run_folder import partial_path

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage(Generic[T]):
    """What one stage has written: `finished` once its file has its final name."""

    rows: tuple[T, ...]
    finished: bool


def read_stage(folder: Path, name: str, kind: type[T]) -> Stage[T] | None:
    """The rows of `name.jsonl`, or of `name.partial.jsonl` while the stage is going on.

    Args:
      folder: The run folder, or that of one of its rounds.
      name: `exam`, `lesson`, `metrics`, `dev`, `test` or `questions`.
      kind: The record that a row holds; `dict` leaves rows as they are.

    Returns:
      The rows in file order, or None if the stage has not begun. The last line of a stage in
      progress may be half written and is then left out.

    Raises:
      ValueError: any other line can't be read.
    """
    final = folder / f"{name}.jsonl"
    going_on = partial_path(final)
    for path in (final, going_on, final):  # renamed between two looks: the third one finds it
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            continue
        return Stage(_rows(path, lines, kind, torn=path == going_on), finished=path == final)
    return None


def _rows(path: Path, lines: list[bytes], kind: type[T], *, torn: bool) -> tuple[T, ...]:
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(row if kind is dict else from_json(kind, row))
        except ValueError as error:
            if torn and number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is not a row that a run writes: {error} "
                "Move the file away and run again: the stage is then repeated."
            ) from None
    return tuple(rows)


def round_folders(folder: Path) -> dict[int, Path]:
    """The folders of the rounds that have begun, in order; 0 is the untrained student."""
    paths = {path.name.removeprefix("round_"): path for path in folder.glob("round_*")}
    return {int(name): paths[name] for name in sorted(paths) if name.isdecimal()}
