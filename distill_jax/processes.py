"""The processes of one run: what the first tells the others, and which of them is missing.

All processes make the same calls of `tell` and `gather` in the same order. A process on its own
needs neither `join` nor anybody's answer. Nothing here imports JAX: processes meet in a store of
keys and values, and a thread of each watches the others, since its main thread may wait for them
inside a collective that never ends.
"""

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from distill_jax.endings import INTERRUPTED, exit_code, sentence

T = TypeVar("T")

_WAIT_MS = 500
"""Waiting is cut into such stretches, so that signals are noticed between them."""

_GO_ON = "the same command goes on from here."

_TOGETHER = 1000
"""Values that are told at a time, of many."""

_GRACE_S = 1.0
"""For those who part to hear that they may."""


@runtime_checkable
class Store(Protocol):
    """Keys and values that all processes see; values are there for good once they are set."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Raises a `RuntimeError` that says DEADLINE_EXCEEDED if nobody sets the key in time."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...

    def get_live_nodes(self, process_ids: Sequence[int]) -> dict[int, int]:
        """Returns once each of these processes asks this too, or has parted, or is dead."""
        ...

    def shutdown(self) -> None:
        """Parts from the others; the process that holds the store is the last."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long the processes of a run wait for each other, in seconds.

    Attributes:
      start: For all to be there.
      lost: Without a sign of life, after which a process counts as lost.
      stuck: Without progress of its work, after which a process that lives counts as stuck.
    """

    start: float = 300.0
    lost: float = 60.0
    stuck: float = 1800.0


@dataclass(frozen=True)
class _Sign:
    """A sign of life. Phases and steps count on; a process that waits can't be what is stuck."""

    beat: int = 0
    phase: int = 0
    steps: int = 0
    doing: str = "the start"
    waits: bool = False
    code: int | None = None  # it has ended, so
    said: str = ""


class _Alone:
    """The only process."""

    index, count = 0, 1

    def tell(self, name: str, work: Callable[[], T]) -> T:
        return work()

    def gather(self, name: str, value: T) -> list[T]:
        return [value]

    def tick(self, doing: str) -> None:
        pass


class Team:
    """This process among the others. In a `with` statement the functions of this file use it.

    An error that leaves the block ends all processes, with the same exit code and sentence.
    """

    def __init__(self, store: Store, *, index: int, count: int, limits: Limits):
        """Says nothing yet.

        Args:
          store: Seen by all.
          index: Of this process, from 0.
          count: Of all.
          limits: For the others.
        """
        self.index, self.count = index, count
        self._store, self._limits = store, limits
        self._sign, self._lock = _Sign(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._told: list[str] = []

    def __enter__(self) -> "Team":
        global _current
        _current = self
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        if error is None:
            self.gather("the end", None)
            self._closed.set()
            self._thread.join()
            self._part()
            _current = _Alone()
            return
        code = exit_code(error)
        if isinstance(error, RuntimeError) and code is None:
            # Most likely a collective that broke because another process is gone. The watching
            # thread, which is about to find out, then ends this one.
            time.sleep(self._limits.lost + 5 * self._pause)
        self._closed.set()
        self._thread.join()
        said = sentence(error)
        if code is None:
            traceback.print_exception(error)
            said = f"{type(error).__name__}: {error}"
        self._end(said, f"process {self.index} ended: {said}", code or 1)

    def tell(self, name: str, work: Callable[[], T]) -> T:
        key = self._enter(name)
        if self.index == 0:
            self._forget()
            value = work()
            self._store.key_value_set(f"{key}/value", json.dumps(value))
            self._told.append(key)
            return value
        value = json.loads(self._wait(f"{key}/value"))
        self._store.key_value_set(f"{key}/got/{self.index}", "")
        return value

    def gather(self, name: str, value: T) -> list[T]:
        key = self._enter(name)
        self._store.key_value_set(f"{key}/{self.index}", json.dumps(value))
        return [json.loads(self._wait(f"{key}/{index}")) for index in range(self.count)]

    def tick(self, doing: str) -> None:
        with self._lock:
            self._sign = replace(self._sign, steps=self._sign.steps + 1, doing=doing)

    def _enter(self, name: str) -> str:
        with self._lock:
            phase = self._sign.phase + 1
            self._sign = replace(self._sign, phase=phase, steps=0, doing=name)
        return f"phase/{phase}"

    def _wait(self, key: str) -> str:
        with self._lock:
            self._sign = replace(self._sign, waits=True)
        while True:
            try:
                value = self._store.blocking_key_value_get(key, _WAIT_MS)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            else:
                break
        with self._lock:
            self._sign = replace(self._sign, waits=False)
        return value

    def _forget(self) -> None:
        """Deletes what everybody has heard."""
        for key in list(self._told):
            if len(self._store.key_value_dir_get(f"{key}/got")) == self.count - 1:
                self._store.key_value_delete(key)
                self._told.remove(key)

    @property
    def _pause(self) -> float:
        """Seconds between two signs of life."""
        return min(1.0, self._limits.lost / 10)

    def _watch(self) -> None:
        watch = Watch(self.index, self.count, self._limits)
        while not self._closed.wait(self._pause):
            try:
                self._show()
                signs = self._read_signs()
            except RuntimeError:  # only where JAX has not ended this process already
                _say(f"process 0 can't be reached; {_GO_ON}")
                os._exit(INTERRUPTED)
            for sign in signs.values():
                if sign.code:
                    self._end(sign.said, sign.said, sign.code)
            problem = watch.look(signs, time.monotonic())
            if problem:
                self._fail(problem)

    def _show(self, **changes: Any) -> None:
        with self._lock:
            self._sign = replace(self._sign, beat=self._sign.beat + 1, **changes)
            text = json.dumps(asdict(self._sign))
        self._store.key_value_set(f"sign/{self.index}", text, allow_overwrite=True)

    def _read_signs(self) -> dict[int, _Sign]:
        found = self._store.key_value_dir_get("sign")
        return {int(key.rpartition("/")[2]): _Sign(**json.loads(text)) for key, text in found}

    def _fail(self, problem: str) -> NoReturn:
        said = f"{problem}; {_GO_ON}"
        self._end(said, said, INTERRUPTED)

    def _end(self, said: str, for_others: str, code: int) -> NoReturn:
        """Ends this process, which says why, and the others."""
        _say(said)
        self._show(code=code, said=for_others)
        self._part()
        os._exit(code)  # the main thread may wait for ever in a collective

    def _part(self) -> None:
        """Parts from the others. JAX ends them without a word if the store goes before they do."""
        if self.index == 0:
            self._store.get_live_nodes(range(self.count))
            time.sleep(_GRACE_S)
        else:
            self._store.shutdown()


class Watch:
    """Finds who is missing, lost or stuck, from the signs of life of all."""

    def __init__(self, index: int, count: int, limits: Limits):
        """Args as `Team`."""
        self._index, self._limits = index, limits
        self._begun: float | None = None
        self._signs: dict[int, _Sign] = {}
        self._alive: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._everybody = range(count)

    def look(self, signs: dict[int, _Sign], now: float) -> str:
        """Takes the newest signs; returns who is wrong and how, or an empty string."""
        self._begun = now if self._begun is None else self._begun
        for index, sign in signs.items():
            before = self._signs.get(index)
            if before is None or sign.beat != before.beat:
                self._alive[index] = now
            if before is None or _position(sign) != _position(before):
                self._moved[index] = now
        self._signs = signs
        missing = [index for index in self._everybody if index not in signs]
        if missing and now - self._begun > self._limits.start:
            return f"{names(missing)} did not come within {self._limits.start:.0f} s"
        lost = [i for i, at in self._alive.items() if now - at > self._limits.lost]
        if lost:
            return (
                f"{names(lost)} gave no sign of life for {self._limits.lost:.0f} s, last seen at: "
                f"{signs[lost[0]].doing}"
            )
        still = [i for i, at in self._moved.items() if now - at > self._limits.stuck]
        working = [i for i in still if not signs[i].waits]
        if len(still) == len(self._everybody) and working:
            last = min(map(_position, (signs[i] for i in working)))
            stuck = [i for i in working if _position(signs[i]) == last]
            return (
                f"{names(stuck)} made no progress for {self._limits.stuck:.0f} s, stuck at: "
                f"{signs[stuck[0]].doing}"
            )
        return ""


def _say(text: str) -> None:
    print(f"distill-jax: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()


def _position(sign: _Sign) -> tuple[int, int]:
    return sign.phase, sign.steps


def names(indices: Sequence[int]) -> str:
    """Processes by number.

    Example:
      >>> names([3]), names([1, 4, 5])
      ('process 3', 'processes 1, 4 and 5')
    """
    if len(indices) == 1:
        return f"process {indices[0]}"
    *first, last = map(str, sorted(indices))
    return f"processes {', '.join(first)} and {last}"


_current: _Alone | Team = _Alone()


def is_main() -> bool:
    """Whether this process is the one that touches the network, the ledger and the run folder."""
    return _current.index == 0


def tell(name: str, work: Callable[[], T]) -> T:
    """Has the first process do what only it may, and tells all what it learnt.

    The others wait, for as long as the first one makes progress. All processes call this.

    Args:
      name: What is being done: errors say it.
      work: Called in the first process alone.

    Returns:
      What `work` returned, in every process: anything that JSON holds; tuples become lists.

    Example:
      >>> tell("adding", lambda: 1 + 1)
      2
    """
    return _current.tell(name, work)


def tell_each(name: str, work: Callable[[], Iterable[T]]) -> Iterator[T]:
    """The same for many values, some of them at a time: nobody ever holds them all.

    All processes go through all of them.

    Example:
      >>> list(tell_each("counting", lambda: range(3)))
      [0, 1, 2]
    """
    values = None

    def some() -> list[T]:
        nonlocal values
        values = iter(work()) if values is None else values
        return list(itertools.islice(values, _TOGETHER))

    while told := tell(name, some):
        yield from told


def gather(name: str, value: T) -> list[T]:
    """The values of all processes, in order, in each of them. All processes call this.

    Args:
      name: What it is for: errors say it.
      value: Anything that JSON holds.

    Example:
      >>> gather("counting", 7)
      [7]
    """
    return _current.gather(name, value)


def tick(doing: str) -> None:
    """Notes that this process makes progress with what it is `doing`."""
    _current.tick(doing)
