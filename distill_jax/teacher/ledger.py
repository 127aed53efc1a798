"""Every request to the teacher, every raw answer and every dollar, on disk before anyone reads it.

A SQLite file in write-ahead mode whose commits reach the disk (`synchronous=FULL`). Before a
request goes out its intent is written with the most it may cost; when the answer comes its body is
written as it came; only then is it read and its real cost booked. No provider can be asked whether
a request that never came back was billed, so an intent that was never closed counts as spent.
"""

import contextlib
import errno
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY_SCHEMA = 1  # part of every key: raised when the meaning of a key's parts changes
_FILE_SCHEMA = 1
_NANO = 10**9  # money is kept in whole billionths of a dollar, so that sums are exact
_BUSY_S = 60.0  # how long to wait for another process that is writing
_DISK_ERRORS = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}

_TABLES = """
CREATE TABLE requests (key TEXT PRIMARY KEY, request TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE intents (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL REFERENCES requests, slots TEXT NOT NULL,
  reserved INTEGER NOT NULL, spent INTEGER, started REAL NOT NULL);
CREATE TABLE answers (
  intent INTEGER PRIMARY KEY REFERENCES intents, key TEXT NOT NULL, slots TEXT NOT NULL,
  raw TEXT NOT NULL, attempts INTEGER NOT NULL, latency_s REAL NOT NULL, received REAL NOT NULL,
  served_model TEXT, usage TEXT, finish_reasons TEXT);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE failures (
  intent INTEGER PRIMARY KEY REFERENCES intents, kind TEXT NOT NULL, detail TEXT NOT NULL,
  at REAL NOT NULL);
CREATE TABLE total (spent INTEGER NOT NULL);
INSERT INTO total VALUES (0);
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A raw answer as it came."""

    intent: int  # the request that it answers
    slots: tuple[int, ...]  # the samples that the request asked for, in order
    raw: str  # the HTTP body
    settled: bool  # whether its cost has been booked; until then its reservation counts as spent


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


def request_key(request: Mapping[str, Any]) -> str:
    """The SHA-256 that stands for a request: the same parts in any order give the same key.

    Args:
      request: All that decides what comes back. The sample slot is kept beside the key.

    Example:
      >>> request_key({"model": "m", "top_p": 0.9}) == request_key({"top_p": 0.9, "model": "m"})
      True
    """
    return hashlib.sha256(canonical({"key_schema": KEY_SCHEMA, **request}).encode()).hexdigest()


def canonical(request: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces: equal requests give equal text."""
    return json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Ledger:
    """The ledger of one run; belongs to the thread that opened it.

    Other threads and processes may open the same file: reservations exclude each other.

    Args:
      path: The file, made if absent.

    Raises:
      ValueError: the file is not a ledger, or was written by another version.
    """

    def __init__(self, path: Path):
        self._database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                self._check_schema(path)
        except BaseException as error:
            self.close()
            if type(error) is sqlite3.DatabaseError:
                raise ValueError(f"{path} is not a ledger: {error}.") from None
            raise

    def _check_schema(self, path: Path) -> None:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _TABLES.split(";"):
                self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version = {_FILE_SCHEMA}")
        elif version != _FILE_SCHEMA:
            raise ValueError(
                f"{path} is a ledger of schema {version}; this version reads {_FILE_SCHEMA}. "
                "Go on with the version that wrote it: nothing in it has been touched."
            )

    def close(self) -> None:
        """Closes the file; everything in it was already on disk."""
        self._database.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and on disk when it is left; a full disk is an `OSError`."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                number = _DISK_ERRORS.get(error.sqlite_errorcode & 0xFF)
                if number is not None:
                    raise OSError(number, f"the ledger can't be written: {error}") from error
            raise

    def reserve(
        self,
        request: Mapping[str, Any],
        slots: Sequence[int],
        *,
        usd: float,
        limit_usd: float | None,
    ) -> int | None:
        """Writes down that a request is about to be sent, if the budget allows it.

        The check and the reservation are one transaction, so that `spent_usd` never passes the
        limit, whatever runs at the same time.

        Args:
          request, slots: As for `request_key`, and the samples it asks for.
          usd: The most it can cost, in US dollars.
          limit_usd: The budget; None for an endpoint without one.

        Returns:
          The intent, to be closed by `settle` or `fail`; None when the budget has no room.
        """
        key, reserved = request_key(request), math.ceil(usd * _NANO)
        with self._transaction():
            (spent,) = self._database.execute("SELECT spent FROM total").fetchone()
            if limit_usd is not None and spent + reserved > math.floor(limit_usd * _NANO):
                return None
            self._database.execute("UPDATE total SET spent = spent + ?", (reserved,))
            self._database.execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?)", (key, canonical(request))
            )
            cursor = self._database.execute(
                "INSERT INTO intents (key, slots, reserved, started) VALUES (?, ?, ?, ?)",
                (key, json.dumps(list(slots)), reserved, time.time()),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def store(self, intent: int, raw: str, *, attempts: int, latency_s: float) -> None:
        """Commits the body of an answer, unread. Its reservation still counts as spent."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO answers (intent, key, slots, raw, attempts, latency_s, received) "
                "SELECT id, key, slots, ?, ?, ?, ? FROM intents WHERE id = ?",
                (raw, attempts, latency_s, time.time(), intent),
            )

    def settle(
        self,
        intent: int,
        *,
        usd: float | None,
        served_model: str | None,
        usage: Mapping[str, Any] | None,
        finish_reasons: Sequence[str | None],
    ) -> None:
        """Books what a stored answer really cost, and what was read from it.

        Args:
          intent: The request.
          usd: US dollars; None when unknown, which leaves the reservation spent.
          served_model, usage, finish_reasons: As the answer says; a reason per choice.
        """
        with self._transaction():
            self._book(intent, usd)
            self._database.execute(
                "UPDATE answers SET served_model = ?, usage = ?, finish_reasons = ? "
                "WHERE intent = ?",
                (served_model, json.dumps(usage), json.dumps(list(finish_reasons)), intent),
            )

    def fail(self, intent: int, kind: str, detail: str, *, usd: float | None) -> None:
        """Books a request that brought no answer; a body stored for it moves to the failures.

        Args:
          intent: The request.
          kind: What went wrong, in a word or two.
          detail: What was received instead, as far as it is known.
          usd: 0.0 when surely not billed; None when unknown, which leaves the reservation spent.
        """
        with self._transaction():
            self._book(intent, usd)
            self._database.execute("DELETE FROM answers WHERE intent = ?", (intent,))
            self._database.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?)", (intent, kind, detail, time.time())
            )

    def _book(self, intent: int, usd: float | None) -> None:
        """Closes an intent; the total loses what was reserved beyond the cost."""
        spent = None if usd is None else math.ceil(usd * _NANO)
        self._database.execute(
            "UPDATE total SET spent = spent + "
            "(SELECT coalesce(?, reserved) - reserved FROM intents WHERE id = ?)",
            (spent, intent),
        )
        closed = self._database.execute(
            "UPDATE intents SET spent = coalesce(?, reserved) WHERE id = ? AND spent IS NULL",
            (spent, intent),
        )
        assert closed.rowcount == 1, f"intent {intent} is unknown or already closed"

    def answers(self, key: str) -> list[Stored]:
        """The raw answers to a request, in the order they were asked."""
        rows = self._database.execute(
            "SELECT intent, answers.slots, raw, spent IS NOT NULL FROM answers "
            "JOIN intents ON intents.id = intent WHERE answers.key = ? ORDER BY intent",
            (key,),
        )
        return [
            Stored(intent, tuple(json.loads(slots)), raw, bool(settled))
            for intent, slots, raw, settled in rows
        ]

    @property
    def spent_usd(self) -> float:
        """US dollars spent or possibly spent."""
        (spent,) = self._database.execute("SELECT spent FROM total").fetchone()
        return spent / _NANO


def read_totals(path: Path) -> Totals:
    """The totals of a ledger that may be in use by another process; writes nothing.

    Raises:
      FileNotFoundError: there is no ledger at `path`.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no ledger at {path}.")
    address = f"{path.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_BUSY_S)) as database:
        requests, still_open, reserved, spent = database.execute(
            "SELECT count(*), count(*) - count(spent), "
            "coalesce(sum(reserved) FILTER (WHERE spent IS NULL), 0), coalesce(sum(spent), 0) "
            "FROM intents"
        ).fetchone()
        (answers,) = database.execute("SELECT count(*) FROM answers").fetchone()
        (failures,) = database.execute("SELECT count(*) FROM failures").fetchone()
    return Totals(
        spent_usd=(reserved + spent) / _NANO,
        open_usd=reserved / _NANO,
        num_requests=requests,
        num_answers=answers,
        num_failures=failures,
        num_open=still_open,
    )
