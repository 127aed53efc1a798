"""A parent that outlives the work, and says how it ended when the work itself no longer can.

On several hosts native code ends a process without a word from Python: when the process that
coordinates is gone, or a device fails. Launchers then still get a sentence and an exit code.
"""

import os
import signal
import sys
import threading

from distill_jax.endings import INTERRUPTED


def take_shelter(index: int) -> None:
    """Goes on in a child process; the parent passes SIGTERM on and ends as the child ended.

    Call it before any thread is started. If the parent is killed the child ends at once.

    Args:
      index: Of this process among those of the run; -1 if it is not known yet.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
        return
    os.close(reader)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the child by itself
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        print(
            f"distill-jax: {_describe(signal.Signals(-code), index)}", file=sys.stderr, flush=True
        )
    os._exit(INTERRUPTED if code < 0 else code)


def _end_with_parent(reader: int) -> None:
    os.read(reader, 1)  # returns once the parent, which never writes, is gone
    os._exit(128 + signal.SIGKILL)


def _describe(number: signal.Signals, index: int) -> str:
    if number == signal.SIGABRT and index:
        return (
            "the devices' runtime gave up, as it does when process 0, which coordinates, is gone; "
            "the lines above say more. The same command goes on from here."
        )
    return f"this process was killed ({number.name}); the same command goes on from here."
