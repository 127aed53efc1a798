"""Where each stage's output lives; what is finished, and what is in progress.

A stage is finished when its file exists: files are written beside and renamed last. A stage in
progress appends to `<stage>.partial.jsonl`, so that a killed run loses one line at most.

Of several processes the first alone writes: in the others, what would write does nothing.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distill_jax.bucket import local_folder
from distill_jax.config import Config, ConfigError
from distill_jax.config_file import differences, load_config, to_yaml
from distill_jax.processes import is_main
from distill_jax.records import from_json, to_json

T = TypeVar("T")

FREE_TO_CHANGE = (
    "folder",
    "exam.slots",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "teacher.api_key_env",
    "teacher.budget_usd",
    "teacher.concurrency",
    "teacher.mode",
    "teacher.per_minute",
    "teacher.price_usd",
    "train.checkpoint_every",
    "train.microbatch_size",
    "train.remat",
)
"""Knobs that may differ when a run goes on: they change its speed or price, not its records."""

ANOTHER_FOLDER = (
    "name another folder; with a copy of this run's ledger.sqlite* in it, requests that stay the "
    "same are not paid again, and what was spent counts against the budget"
)
"""How to change the others."""


def open_run(config: Config) -> Path:
    """Makes the run folder, or checks that it belongs to this config.

    Raises:
      ConfigError: the folder holds a run with other settings; names each of them.
    """
    folder = local_folder(config.folder)
    path = folder / "config.yaml"
    if path.exists():
        changed = [
            line
            for line in differences(load_config(path), config)
            if not line.startswith(tuple(f"{name}:" for name in FREE_TO_CHANGE))
        ]
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                f"continue it with its own, or {ANOTHER_FOLDER}."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, to_yaml(config))
    _drop_leftovers(folder)
    return folder


def _drop_leftovers(folder: Path) -> None:
    """Drops the partial files of finished stages: a kill leaves both, and so does half a copy."""
    for path in folder.glob("round_*/*.jsonl"):
        partial_path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the run while the first works on it. Makes the folder.

    Raises:
      ConfigError: another process holds the run; names it and its host.
    """
    if not is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{folder} is being worked on by {holder}.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine works on the run."""
    try:
        with (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def round_folder(folder: Path, round_index: int) -> Path:
    """The folder of a round, made if absent; 0 is the untrained student.

    Example:
      >>> import tempfile
      >>> round_folder(Path(tempfile.mkdtemp()), 3).name
      'round_03'
    """
    path = folder / f"round_{round_index:02d}"
    if is_main():
        path.mkdir(parents=True, exist_ok=True)
    return path


def partial_path(path: Path) -> Path:
    """Where a stage collects its rows before `path` is finished.

    Example:
      >>> partial_path(Path("round_01/exam.jsonl")).name
      'exam.partial.jsonl'
    """
    return path.with_suffix(f".partial{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file beside `path` and renames it into place."""
    _write(path, [text])


def _write(path: Path, texts: Iterable[str]) -> None:
    if not is_main():
        return
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object as a whole file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_records(path: Path, records: Iterable[object]) -> None:
    """Writes a finished stage's records, one JSON object per line."""
    write_rows(path, map(to_json, records))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a finished stage's rows, one JSON object per line, and drops its partial file."""
    if is_main():
        _write(path, map(_line, rows))
        partial_path(path).unlink(missing_ok=True)


def sort_rows(path: Path, key: Callable[[dict[str, Any]], tuple[int, ...]]) -> int:
    """Makes the partial file of a stage its finished file, in order; returns how many rows.

    Holds a few numbers of every row, not the rows.

    Args:
      path: The finished file.
      key: As many whole numbers for each row, which sort them.
    """
    partial, keys, ends = partial_path(path), array("q"), array("q", [0])
    with partial.open("rb") as file:
        for line in file:
            keys.extend(key(json.loads(line)))
            ends.append(ends[-1] + len(line))
        count = len(ends) - 1
        columns = np.frombuffer(keys, np.int64).reshape(count, -1).T if count else ()

        def lines() -> Iterator[str]:
            for number in np.lexsort(columns[::-1]).tolist() if count else ():
                file.seek(ends[number])
                yield file.read(ends[number + 1] - ends[number]).decode()

        _write(path, lines())
    partial.unlink()
    return count


def read_records(path: Path, kind: type[T]) -> list[T]:
    """The records of a finished stage."""
    return [*stream_records(path, kind)]


def stream_records(path: Path, kind: type[T]) -> Iterator[T]:
    """The same, one after the other."""
    return (from_json(kind, row) for row in stream_rows(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a stage, finished or not; none if there is no file."""
    return [*stream_rows(path)]


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after the other."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


class Partial:
    """The rows of a stage in progress. Opening it repairs a line that a crash cut short.

    Only the first process has them.
    """

    def __init__(self, path: Path):
        self._path = partial_path(path)
        self._ends, self._file, self._synced = array("q"), None, time.monotonic()
        if is_main():
            self._ends = _find_ends(self._path)
            self._file = self._path.open("ab")
            self.keep(len(self))

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows. A process that is killed leaves them; a machine may lose the last second's."""
        if self._file:
            for line in (_line(row).encode() for row in rows):
                self._file.write(line)
                self._ends.append(len(line) + (self._ends[-1] if self._ends else 0))
            self._file.flush()
            if time.monotonic() - self._synced > 1.0:
                self.sync()

    def sync(self) -> None:
        """Returns once all rows are on the disk."""
        if self._file:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def keep(self, num_rows: int) -> None:
        """Forgets the rows after the first `num_rows`."""
        del self._ends[num_rows:]
        if self._file:
            self._file.truncate(self._ends[-1] if self._ends else 0)

    def close(self) -> None:
        """Releases the file; the rows stay."""
        if self._file and not self._file.closed:
            self.sync()
            self._file.close()

    def finish(self, path: Path) -> None:
        """Makes the rows, as they are, the finished stage `path`."""
        self.close()
        if self._file:
            self._path.replace(path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"  # ASCII: a lone surrogate in a teacher's text can't break it


def _find_ends(path: Path) -> array:
    """Where the lines before the first that is cut short or is not JSON end, in bytes."""
    ends = array("q")
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for line in lines:
            try:
                json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            ends.append(len(line) + (ends[-1] if ends else 0))
    return ends


@contextlib.contextmanager
def timed(folder: Path, round_index: int, stage: str) -> Iterator[None]:
    """Adds the time that the block takes to that of a round's stage, also when interrupted."""
    start = time.monotonic()
    try:
        yield
    finally:
        if is_main():
            spent = read_round(folder, round_index).get("seconds", {})
            total = round(spent.get(stage, 0.0) + time.monotonic() - start, 3)
            update_round(folder, round_index, seconds={**spent, stage: total})


def read_round(folder: Path, round_index: int) -> dict[str, Any]:
    """What `round.json` says of a round; empty before its first stage ended."""
    return read_json(folder / f"round_{round_index:02d}" / "round.json")


def update_round(folder: Path, round_index: int, **facts: Any) -> None:
    """Sets facts in a round's `round.json`."""
    if is_main():
        path = round_folder(folder, round_index) / "round.json"
        write_json(path, {**read_json(path), **facts})


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Notes once what made the run: versions, machine and the given facts."""
    path = folder / "manifest.json"
    if path.exists():
        return
    packages = ("distill_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "openai")
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    write_json(path, {"versions": versions, **machine, **facts})


def hash_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
