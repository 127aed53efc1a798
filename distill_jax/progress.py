"""How everything that takes longer than a few seconds shows itself, always on stderr.

On a terminal a bar with rate and time left; elsewhere one plain line every few seconds. Text from
a model or a file may be handed in as it is: it never controls the terminal.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from distill_jax.processes import tick

PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal

_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movement
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # window titles, links and other strings
    r"|\x1b[ -/]*[0-~]"
)
_INVISIBLE = re.compile(  # control, bidirectional, zero-width and tag characters, lone surrogates
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class Advance(Protocol):
    """Tells a stage that more is done; safe to call from several threads."""

    def __call__(self, amount: int = 1, detail: str = "") -> None:
        """Adds `amount` units; `detail` is shown behind the numbers until the next one."""
        ...


class Progress:
    """Where a run says what it is doing; made once, by a command, and passed down.

    Args:
      quiet: Say nothing at all: for tests, and for all processes but one.
      console: Where to; stderr unless told otherwise.
      clock: Seconds that never go back.

    Example:
      >>> progress = Progress(quiet=True)
      >>> with progress.stage("exam, round 1", total=500, unit="questions") as advance:
      ...     advance(16, "3 unreadable")
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.quiet = quiet
        self._console = console or Console(stderr=True)
        self._clock = clock

    def note(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if not self.quiet:
            self._console.print(Text(one_line(text)), soft_wrap=True)

    @contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Shows one stage of work while the `with` block runs.

        Args:
          title: What is being done.
          total: Units in all, those done earlier included.
          unit: What is counted, in the plural.
          done: Units finished before an interruption; they count, but not towards the rate.
        """
        stage = _Stage(one_line(title), total, unit, done, self._clock)
        if self.quiet:
            yield stage.advance
            return
        show = self._bar if self._console.is_interactive else self._lines
        try:
            with show(stage) as advance:
                yield advance
        finally:
            self.note(stage.closing())

    @contextmanager
    def _bar(self, stage: "_Stage") -> Iterator[Advance]:
        """A bar that vanishes at the end: the closing line takes its place."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeElapsedColumn(),  # moves while the first unit is awaited
        )
        with rich.progress.Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(
                stage.title, total=stage.total, completed=stage.done, counts=stage.counts()
            )

            def advance(amount: int = 1, detail: str = "") -> None:
                stage.advance(amount, detail)
                bar.update(task, completed=stage.done, counts=stage.counts())

            yield advance

    @contextmanager
    def _lines(self, stage: "_Stage") -> Iterator[Advance]:
        last = self._clock()
        self.note(stage.opening())

        def advance(amount: int = 1, detail: str = "") -> None:
            nonlocal last
            stage.advance(amount, detail)
            with stage.lock:
                due = self._clock() - last >= PLAIN_EVERY
                if due:
                    last = self._clock()
            if due:
                self.note(f"{stage.title}: {stage.counts()}")

        yield advance


class _Stage:
    """Counts, rate and time left of one stage, in words."""

    def __init__(
        self, title: str, total: int, unit: str, done: int, clock: Callable[[], float]
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.detail = done, ""
        self.lock = threading.Lock()
        self._done_before, self._clock, self._start = done, clock, clock()
        tick(title)

    def advance(self, amount: int = 1, detail: str = "") -> None:
        with self.lock:
            self.done += amount
            tick(self.title)
            self.detail = one_line(detail) or self.detail

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units a second, of those done since the stage opened; 0 before the first."""
        return (self.done - self._done_before) / self.seconds if self.seconds else 0.0

    def opening(self) -> str:
        already = f", {self.done:,} done before" if self.done else ""
        return f"{self.title}: {self.total:,} {self.unit}{already}"

    def counts(self) -> str:
        """How much is done, how fast, how long it will take still."""
        counts = f"{self.done:,} of {self.total:,} {self.unit}"
        if self.rate:
            left = max(self.total - self.done, 0) / self.rate
            counts += f", {_per_second(self.rate)}, {duration(left)} left"
        return f"{counts}, {self.detail}" if self.detail else counts

    def closing(self) -> str:
        """What was done and how fast, or how far it came."""
        if self.done < self.total:
            counts = f"stopped at {self.done:,} of {self.total:,} {self.unit}"
        else:
            counts = f"{self.done:,} {self.unit}"
        pace = f" ({_per_second(self.rate)})" if self.rate else ""
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.title}: {counts} in {duration(self.seconds)}{pace}{detail}"


def _per_second(rate: float) -> str:
    return f"{rate:,.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"


def duration(seconds: float | int) -> str:
    """Seconds in words, to two figures' worth of units.

    Example:
      >>> duration(8.24), duration(187), duration(7260)
      ('8.2 s', '3 min 07 s', '2 h 01 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def printable(text: str) -> str:
    """Text that can't steer a terminal or a page, for all of what models and files may hold.

    Terminal escape sequences are cut out. Any other character that is invisible or changes the
    direction of reading becomes U+FFFD, so that its being there still shows.

    Example:
      >>> printable("a\\x1b[31mred\\x1b[0m b")
      'ared b'
    """
    return _INVISIBLE.sub("\ufffd", _ANSI.sub("", text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """`printable` text with every run of white space as one space.

    Example:
      >>> one_line("2 + 2\\n\\n  is 4\\n")
      '2 + 2 is 4'
    """
    return " ".join(printable(text).split())
