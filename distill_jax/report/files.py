"""Reads the files of a run folder, whether the run has ended or is still writing them."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

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
        torn = len(lines) if path == going_on else None
        return Stage(tuple(_rows(path, lines, kind, torn=torn)), finished=path == final)
    return None


def finished_rows(folder: Path, name: str, kind: type[T]) -> Iterator[T]:
    """The rows of a stage, one after the other; none as long as it is going on.

    Args and errors are those of `read_stage`.
    """
    path = folder / f"{name}.jsonl"
    if path.exists():
        with path.open("rb") as lines:
            yield from _rows(path, lines, kind, torn=None)


def _rows(path: Path, lines: Iterable[bytes], kind: type[T], *, torn: int | None) -> Iterator[T]:
    """Reads lines, of which the one that is `torn` may be half written."""
    make: Callable[[Any], Any] = dict if kind is dict else partial(from_json, kind)
    for number, line in enumerate(lines, start=1):
        try:
            yield make(json.loads(line))
        except ValueError as error:
            if number == torn:
                break
            raise ValueError(
                f"{path}, line {number} is not a row that a run writes: {error} "
                "Move it and result.json, if there is one, away and run again: the stage is then "
                "repeated."
            ) from None


def round_folders(folder: Path) -> dict[int, Path]:
    """The folders of the rounds that have begun, in order; 0 is the untrained student."""
    paths = {path.name.removeprefix("round_"): path for path in folder.glob("round_*")}
    return {int(name): paths[name] for name in sorted(paths) if name.isdecimal()}
