"""Writes into the ledger from a thread of its own.

Every entry is on disk before its writer goes on, and a disk takes milliseconds for that. So the
entries that gather while it works go there together, and nobody who waits for an answer of the
teacher waits for the disk. What the disk has no room for goes into a file that holds its room
already.
"""

import asyncio
import errno
import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from distill_jax.teacher.ledger import Ledger

T = TypeVar("T")

log = logging.getLogger(__name__)

LEAST_FREE = 32 << 20
"""Bytes that must be free on the ledger's disk for another request to be sent."""

_RESERVE = 4 << 20  # bytes that are held for answers which come when the disk is full
_MOST_TOGETHER = 256


class Clerk:
    """Takes entries for a ledger while the `with` block runs.

    Args:
      path: The ledger's file.

    Raises:
      ValueError, OSError: as `Ledger`. Nothing has been sent.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries: queue.SimpleQueue[tuple[Callable[[Ledger], Any], Future] | None]
        self._entries = queue.SimpleQueue()
        self._ledger = Ledger(path)
        try:
            self._reserve = Reserve(_reserve_path(path))
        except BaseException:
            self._ledger.close()
            raise
        self._thread = threading.Thread(target=self._work, name="clerk")

    def __enter__(self) -> "Clerk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._entries.put(None)
        self._thread.join()
        self._ledger.close()
        self._reserve.close()

    async def write(self, entry: Callable[[Ledger], T]) -> T:
        """Makes an entry; it is on disk when this returns.

        Raises:
          OSError: the disk is full or can't be written.
        """
        return await asyncio.wrap_future(self._submit(entry))

    def _submit(self, entry: Callable[[Ledger], T]) -> "Future[T]":
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # whoever waits may leave; the entry is made
        self._entries.put((entry, future))
        return future

    async def store(self, intent: int, raw: str, **facts: Any) -> None:
        """Stores an answer as `Ledger.store` does; if the disk is full, in the reserve.

        Raises:
          OSError: the disk is full. The answer is safe all the same.
        """
        try:
            await self.write(lambda ledger: ledger.store(intent, raw, **facts))
        except OSError:
            self._reserve.keep({"intent": intent, "raw": raw, **facts})
            raise

    def check_room(self) -> None:
        """Makes sure that there is room for what comes back, before it is asked for.

        Raises:
          OSError: there is not.
        """
        free = shutil.disk_usage(self._path.parent).free
        if free < LEAST_FREE:
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self._path} has {free >> 20} MiB left, and the teacher is only "
                f"asked with {LEAST_FREE >> 20} MiB or more; make room and run the same command "
                "again",
            )

    def _work(self) -> None:
        while (first := self._entries.get()) is not None:
            together = [first]
            while len(together) < _MOST_TOGETHER and not self._entries.empty():
                entry = self._entries.get()
                if entry is None:
                    self._entries.put(None)
                    break
                together.append(entry)
            _enter(self._ledger, together)


def _enter(ledger: Ledger, entries: Sequence[tuple[Callable[[Ledger], Any], Future]]) -> None:
    """Makes entries in one go; if one can't be made, each on its own."""
    try:
        with ledger.together():
            results = [entry(ledger) for entry, _ in entries]
    except BaseException as error:
        if len(entries) == 1:
            entries[0][1].set_exception(error)
        else:
            for entry in entries:
                _enter(ledger, [entry])
        return
    for (_, future), result in zip(entries, results, strict=True):
        future.set_result(result)


def pour(ledger: Ledger) -> None:
    """Writes into a ledger the answers that a former process could only save in the reserve."""
    path = _reserve_path(ledger.path)
    if not path.exists():
        return
    lines = path.read_bytes().rstrip(b"\0").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    with ledger.together():
        for row in rows:
            ledger.store(**row)
    path.unlink()
    if rows:
        log.warning("%d answers that came when the disk was full are saved.", len(rows))


def _reserve_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.reserve")


class Reserve:
    """A file that holds room on the disk, for answers that come when there is none left.

    Args:
      path: The file, made here.

    Raises:
      OSError: there is no room even for the reserve.
    """

    def __init__(self, path: Path):
        self._path, self._used = path, 0
        with path.open("wb") as file:
            file.write(bytes(_RESERVE))  # zeros that are written take room; a hole would not
            file.flush()
            os.fsync(file.fileno())

    def keep(self, row: dict[str, Any]) -> None:
        """Saves an answer; it is on disk when this returns.

        Raises:
          OSError: the reserve is full.
        """
        line = json.dumps(row).encode() + b"\n"
        if self._used + len(line) > _RESERVE:
            raise OSError(errno.ENOSPC, f"{self._path} has no room for another answer")
        with self._path.open("r+b") as file:
            file.seek(self._used)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._used += len(line)

    def close(self) -> None:
        """Gives the room back, unless an answer is in it."""
        if not self._used:
            self._path.unlink()
