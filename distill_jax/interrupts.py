"""Signals that ask a run to stop: pre-emption (SIGTERM) and Ctrl-C (SIGINT)."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def heed_preemption() -> None:
    """Makes SIGTERM stop the command as Ctrl-C does: orderly, resumable, with exit code 14."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Lets a block choose the moment: it is given a function that says whether to stop.

    A block that ends without having asked is interrupted there; the second signal stops at once.

    Example:
      >>> with postponed() as asked_to_stop:
      ...     asked_to_stop()
      False
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals go to the main thread, which must look after them
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in NUMBERS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.is_set():
        raise KeyboardInterrupt
