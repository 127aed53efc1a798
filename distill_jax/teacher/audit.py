"""Reads a ledger without changing it: totals, what is wrong with it, its rows as JSONL."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill_jax.teacher.ledger import BUSY_S, NANO, translated


@dataclass(frozen=True, slots=True)
class Totals:
    """What a ledger holds.

    Attributes:
      spent_usd: US dollars spent or possibly spent: settled costs plus open reservations.
      open_usd: The part of `spent_usd` that is not certain.
      num_requests: HTTP requests sent or about to be sent.
      num_answers: Requests that brought an answer.
      num_failures: Requests that brought none.
      num_open: Requests whose end is unknown: in flight now, or when a process was killed.
    """

    spent_usd: float
    open_usd: float
    num_requests: int
    num_answers: int
    num_failures: int
    num_open: int


def read_totals(path: Path) -> Totals:
    """The totals of a ledger that may be in use by another process; writes nothing.

    Raises:
      FileNotFoundError: there is no ledger at `path`.
      ValueError: it is damaged.
    """
    with opened_for_reading(path) as database:
        requests, still_open, reserved, spent = database.execute(
            "SELECT count(*), count(*) - count(spent), "
            "coalesce(sum(reserved) FILTER (WHERE spent IS NULL), 0), coalesce(sum(spent), 0) "
            "FROM intents"
        ).fetchone()
        (answers,) = database.execute("SELECT count(*) FROM answers").fetchone()
        (failures,) = database.execute("SELECT count(*) FROM failures").fetchone()
    return Totals(
        spent_usd=(reserved + spent) / NANO,
        open_usd=reserved / NANO,
        num_requests=requests,
        num_answers=answers,
        num_failures=failures,
        num_open=still_open,
    )


@contextlib.contextmanager
def opened_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can't write; raises as `read_totals`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no ledger at {path}.")
    address = f"{path.resolve().as_uri()}?mode=ro"
    with (
        translated(path),
        contextlib.closing(sqlite3.connect(address, uri=True, timeout=BUSY_S)) as database,
    ):
        yield database
