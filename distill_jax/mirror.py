"""Keeps the working folder of a run and its place in a bucket alike.

The run is worked on in its working folder as any run is in its folder. What is new there is copied
to the bucket every few seconds: the ledger first, by SQLite's own backup, then files in the order
in which they were finished, so that copying may be cut short anywhere. Checkpoints in Google's
buckets have no copy here, since Orbax writes there from all processes; to others it can't.

The bucket is what counts: a machine that was not the last to work on the run fetches all anew.
"""

import _thread
import contextlib
import logging
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distill_jax.bucket import Bucket, BucketError, aside_folder, bucket_url
from distill_jax.claim import OBJECT, SILENT_S, Claim, RunTaken
from distill_jax.config import ConfigError
from distill_jax.processes import gather, is_main
from distill_jax.run_folder import is_locked, lock, read_json, write_json

log = logging.getLogger(__name__)

EVERY_S = 15.0
"""Seconds between two copies at least; nine times as long as the last one took, if that is more."""

_STATE = ".bucket.json"  # here: this machine's claim, and what both sides have
_LEDGER = "ledger.sqlite"
_ON_DEMAND = ("checkpoint", "training")  # folders too large to be fetched unasked
_WEIGHTS = ".safetensors"  # so are these files
_PASSING = ("-wal", "-shm", ".reserve", ".partial")  # ends of names that nobody else can use

_open: list["Mirror"] = []


class Mirror:
    """The working folder of a run, and its place in a bucket.

    Args:
      folder: A working folder.

    Raises:
      ConfigError: the package that reaches the bucket is not installed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.busy = threading.RLock()  # held while files move
        self._bucket = Bucket(bucket_url(folder))
        state = read_json(folder / _STATE)
        self._claim = Claim(self._bucket, state.get("claim", ""))
        # By name: the tag there, or "" if it was written from here; size and time of the file here.
        self._alike: dict[str, list[Any]] = state.get("alike", {})
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._error: BucketError | OSError | None = None

    def write_state(self) -> None:
        """Has the next process know what this one does."""
        write_json(self.folder / _STATE, {"claim": self._claim.name, "alike": self._alike})

    def take(self, note: Callable[[str], None]) -> None:
        """Makes the run this process's to work on; fetches it if others were the last to do so.

        Args:
          note: Is told where it is worked on.

        Raises:
          ConfigError: another machine works on it.
          BucketError: the bucket can't be read or written.
        """
        self._claim.await_others(note)
        if not self._claim.is_last:
            self._set_aside()
            self._claim.make()
            self.fetch()
        self._claim.sign(held=True)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start background jobs
            signal.signal(signal.SIGINT, signal.default_int_handler)  # `_work` may interrupt us
        self._thread.start()
        note(f"{self._bucket.url} is worked on in {self.folder}, copied every {EVERY_S:.0f} s")
        self.push()

    def refresh(self) -> None:
        """Fetches what is new in the bucket, unless this machine was the last to work on it."""
        if not self._claim.is_last:
            self._set_aside()
            self.fetch()

    def _set_aside(self) -> None:
        """Moves away what this machine had, unless that was a mere copy."""
        if not self._claim.name:
            return
        aside = aside_folder(self.folder, time.strftime("%Y%m%d_%H%M%S"))
        aside.mkdir(parents=True)
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.rename(aside / path.name)
        log.warning(
            "%s has changed since this machine last worked on it; what was here is now in %s.",
            *(self._bucket.url, aside),
        )
        self._claim.name, self._alike = "", {}

    def fetch(self) -> None:
        """Makes the files here those of the bucket, but for weights, which `bring` fetches."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.busy:
            tags = self._bucket.tags()
            tags.pop(OBJECT, None)
            for name, tag in tags.items():
                path = self.folder / name
                known = self._alike.get(name, [""])[0] == tag and path.exists()
                if not known and _is_large(name):
                    path.unlink(missing_ok=True)  # `bring` takes what is here for the bucket's
                    self._alike.pop(name, None)
                elif not known and self._bucket.get(name, path):
                    if name == _LEDGER:  # what a killed reader left of the old one
                        path.with_name(f"{name}-wal").unlink(missing_ok=True)
                    self.remember(name, tag)
                self._claim.renew()
            for name in [name for name in self._alike if name not in tags]:
                (self.folder / name).unlink(missing_ok=True)
                del self._alike[name]
            self.write_state()

    def remember(self, name: str, tag: str) -> None:
        """Remembers that a file here is that of the bucket."""
        self._alike[name] = [tag, *_look(self.folder / name)]

    def push(self) -> None:
        """Copies to the bucket what is new here, and deletes there what is gone here.

        Raises:
          BucketError: the bucket can't be written, or another machine has taken the run.
        """
        with self.busy:
            if self._error:
                raise self._error
            self._claim.renew()
            here = _list_files(self.folder)
            gone = [name for name in self._alike if name not in here]
            self._send(here)
            for name in gone:
                self._bucket.delete(name)
                del self._alike[name]
            if gone:
                self.write_state()

    def look(self) -> dict[str, tuple[int, int]]:
        """The files here and what they look like, for `send`."""
        return _list_files(self.folder)

    def send(self, before: Mapping[str, tuple[int, int]]) -> None:
        """Copies to the bucket what is new since `before`, but for the ledger."""
        with self.busy:
            here = _list_files(self.folder)
            self._send({k: v for k, v in here.items() if k != _LEDGER and before.get(k) != v})

    def _send(self, here: dict[str, tuple[int, int]]) -> None:
        new = {
            name: look for name, look in here.items() if self._alike.get(name, [""])[1:] != [*look]
        }
        if not new:
            return
        self._alike |= {name: ["", 0, 0] for name in new if name not in self._alike}
        self.write_state()  # first, so that whatever is there from here is known
        for name, look in new.items():
            with contextlib.suppress(FileNotFoundError), _still(self.folder / name) as path:
                self._bucket.put(path, name)
                self._alike[name] = ["", *look]
            self._claim.renew()
        self.write_state()

    def _work(self) -> None:
        due, warned = 0.0, False
        while not self._closed.wait(EVERY_S):
            begun = time.monotonic()
            try:
                with self.busy:
                    self._claim.renew()
                    if begun > due:
                        self.push()
                        due = time.monotonic() + 9 * (time.monotonic() - begun)
                warned = False
            except (BucketError, OSError) as error:
                if isinstance(error, RunTaken) or self._claim.silent_s > SILENT_S:
                    self._error = error
                    _thread.interrupt_main()
                    return
                if not warned:
                    log.warning("%s It is tried again.", error)
                warned = True

    def __enter__(self) -> "Mirror":
        _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open.remove(self)
        if not self._claim.held:
            return
        self._closed.set()
        self._thread.join()
        try:
            self.push()
            self._claim.sign(held=False)
        except BucketError as problem:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise
            log.warning("%s", problem)


def _is_large(name: str) -> bool:
    return name.endswith(_WEIGHTS) or not {*_ON_DEMAND}.isdisjoint(name.split("/"))


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files worth a copy, with their looks, in the order in which they are copied."""
    found: dict[str, tuple[float, tuple[int, int]]] = {}
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _lasts(name)]
        for path in (Path(at, name) for name in names if _lasts(name)):
            with contextlib.suppress(FileNotFoundError):
                found[path.relative_to(folder).as_posix()] = (path.stat().st_ctime, _look(path))
    found.pop("lock", None)

    def order(name: str) -> tuple[bool, bool, float]:
        # A state of training is of use only with the figures of all steps before it.
        return name != _LEDGER, "training" in name.split("/"), found[name][0]

    return {name: found[name][1] for name in sorted(found, key=order)}


def _lasts(name: str) -> bool:
    return (
        not name.startswith(".") and not name.endswith(_PASSING) and "-checkpoint-tmp" not in name
    )


def _look(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which it is seen to have changed; of a database with its log."""
    looks = [path.stat()]
    with contextlib.suppress(FileNotFoundError):
        looks.append(path.with_name(f"{path.name}-wal").stat())
    return sum(look.st_size for look in looks), max(look.st_mtime_ns for look in looks)


@contextlib.contextmanager
def _still(path: Path) -> Iterator[Path]:
    """A copy of a file that others may be writing, gone afterwards; of weights the file itself."""
    if _is_large(path.as_posix()):
        yield path
        return
    copy = path.with_name(f".{path.name}.{os.getpid()}.copy")
    try:
        if path.suffix == ".sqlite":
            _back_up(path, copy)
        else:
            shutil.copyfile(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _back_up(path: Path, copy: Path) -> None:
    try:
        with (
            contextlib.closing(sqlite3.connect(path, timeout=60)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as error:
        raise BucketError(f"{path} can't be copied: {error}.") from error


@contextlib.contextmanager
def hold(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps others out of a run while the `with` block works on it; see `run_folder.lock`.

    A run in a bucket is fetched first if others were the last to work on it, and copied all the
    time. All processes of a run call this.

    Args:
      folder: The run, as `local_folder` says.
      note: Is told where the run is worked on.

    Raises:
      ConfigError: somebody else works on the run, or it can't be reached from here.
      BucketError: the bucket can't be read or written. All is in the working folder.
    """
    url = bucket_url(folder)
    if url:
        Bucket(url)  # in every process: each needs its package
        if not url.startswith("gs:") and len(gather("meeting at the bucket", None)) > 1:
            raise ConfigError(
                f"{url}: checkpoints are written from all processes to gs:// or to a file system "
                "that all hosts mount, such as a mounted bucket; name one, or run one process."
            )
    with lock(folder):
        if not url or not is_main():
            yield
            return
        with Mirror(folder) as mirror:
            mirror.take(note)
            yield


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """The folder of a run for reading it; of one in a bucket the newest copy.

    What is added to that, such as a report, is in the bucket afterwards. A run that this machine
    works on, or worked on last, is read as it is here.

    Args:
      folder: The run, as `local_folder` says.

    Raises:
      ConfigError: there is no run in the bucket, or it can't be reached from here.
      BucketError: the bucket can't be read or written.
    """
    url = bucket_url(folder)
    if not url or is_locked(folder):
        yield folder
        return
    with Mirror(folder) as mirror:
        mirror.refresh()
        if not (folder / "config.yaml").exists():
            raise ConfigError(f"{url} holds no run: a run folder has a config.yaml.")
        before = mirror.look()
        try:
            yield folder
        finally:
            mirror.send(before)


def push() -> None:
    """Copies to the bucket what is new in the run that this process holds, if it lies in one.

    Raises:
      BucketError: as `Mirror.push`.
    """
    for mirror in _open:
        mirror.push()


def bring(folder: Path) -> Path:
    """Fetches the files of a folder that a bucket has and this machine has not; returns the folder.

    For what is too large to be fetched unasked: weights and states of training.

    Raises:
      BucketError: the bucket can't be read.
    """
    url = bucket_url(folder)
    if url:
        bucket = Bucket(url)
        mirror = next((mirror for mirror in _open if folder.is_relative_to(mirror.folder)), None)
        with mirror.busy if mirror else contextlib.nullcontext():
            for name, tag in bucket.tags().items():
                path = folder / name
                if not path.exists() and bucket.get(name, path) and mirror:
                    mirror.remember(path.relative_to(mirror.folder).as_posix(), tag)
                    mirror.write_state()
    return folder
