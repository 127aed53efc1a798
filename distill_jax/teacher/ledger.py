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
import logging
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

KEY_SCHEMA = 1  # part of every key: raised when the meaning of a key's parts changes
FILE_SCHEMA = 2
NANO = 10**9  # money is kept in whole billionths of a dollar, so that sums are exact
BUSY_S = 60.0  # how long to wait for another process that is writing
_LONGEST_DETAIL = 1 << 16  # characters of what came instead of an answer
_DISK_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EFBIG,
}
LENIENT_TEXT = partial(str, encoding="utf-8", errors="replace")  # a flipped byte is no error yet
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_TABLES = """
CREATE TABLE requests (key TEXT PRIMARY KEY, request TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE intents (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL REFERENCES requests, slots TEXT NOT NULL,
  reserved INTEGER NOT NULL, spent INTEGER, started REAL NOT NULL, batch INTEGER);
CREATE INDEX intents_by_batch ON intents (batch) WHERE batch IS NOT NULL;
CREATE INDEX open_intents ON intents (id) WHERE spent IS NULL;
CREATE TABLE answers (
  intent INTEGER PRIMARY KEY REFERENCES intents, key TEXT NOT NULL, slots TEXT NOT NULL,
  raw TEXT NOT NULL, sha256 TEXT NOT NULL, attempts INTEGER NOT NULL, latency_s REAL NOT NULL,
  received REAL NOT NULL, request_id TEXT, served_model TEXT, usage TEXT, finish_reasons TEXT);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE failures (
  intent INTEGER PRIMARY KEY REFERENCES intents, key TEXT NOT NULL, kind TEXT NOT NULL,
  detail TEXT NOT NULL, at REAL NOT NULL, final INTEGER NOT NULL);
CREATE INDEX failures_by_key ON failures (key);
CREATE TABLE dialects (
  endpoint TEXT NOT NULL, model TEXT NOT NULL, dialect TEXT NOT NULL,
  PRIMARY KEY (endpoint, model)) WITHOUT ROWID;
CREATE TABLE batches (
  id INTEGER PRIMARY KEY, endpoint TEXT NOT NULL, label TEXT NOT NULL, remote TEXT,
  done INTEGER NOT NULL DEFAULT 0, made REAL NOT NULL);
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
    """The ledger of one run; used by one thread at a time.

    Other threads and processes may open the same file: reservations exclude each other.

    Args:
      path: The file, made if absent.

    Attributes:
      database: The connection, for the other files of this folder.

    Raises:
      ValueError: the file is not a ledger, or was written by another version.
      OSError: the disk is full, or the folder can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with translated(path):
            self.database = sqlite3.connect(
                path,
                isolation_level=None,
                timeout=BUSY_S,
                check_same_thread=False,  # may be opened by one thread and then used by another
            )
        self.database.text_factory = LENIENT_TEXT
        self._reported: set[int] = set()
        self._overrun = False
        try:
            with translated(path):
                self.database.execute("PRAGMA journal_mode = WAL")
                self.database.execute("PRAGMA synchronous = FULL")
            with self.together():
                self._check_schema(path)
        except BaseException:
            self.close()
            raise

    def _check_schema(self, path: Path) -> None:
        (version,) = self.database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _TABLES.split(";"):
                self.database.execute(statement)
            self.database.execute(f"PRAGMA user_version = {FILE_SCHEMA}")
        elif version != FILE_SCHEMA:
            raise ValueError(
                f"{path} is a ledger of schema {version}; this version reads {FILE_SCHEMA}. "
                "Go on with the version that wrote it: nothing in it has been touched."
            )

    def close(self) -> None:
        """Closes the file; everything in it was already on disk."""
        self.database.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All that happens inside or nothing; it is on disk when the block is left.

        Raises:
          OSError: the disk is full or can't be written. Nothing inside happened.
          ValueError: the file is damaged.
        """
        if self.database.in_transaction:
            yield
            return
        with translated(self.path):
            try:
                self.database.execute("BEGIN IMMEDIATE")
                yield
                self.database.execute("COMMIT")
            except BaseException:
                if self.database.in_transaction:
                    self.database.execute("ROLLBACK")
                raise

    def reserve(
        self,
        request: Mapping[str, Any],
        slots: Sequence[int],
        *,
        usd: float,
        limit_usd: float | None,
        batch: int | None = None,
    ) -> int | None:
        """Writes down that a request is about to be sent, if the budget allows it.

        The check and the reservation are one transaction, so that reservations never pass the
        limit, whatever runs at the same time. An answer that costs more than its reservation can
        pass it; that is warned of once.

        Args:
          request, slots: As for `request_key`, and the samples it asks for.
          usd: The most it can cost, in US dollars.
          limit_usd: The budget; None for an endpoint without one.
          batch: The batch in which it goes out, if it does.

        Returns:
          The intent, to be closed by `settle` or `fail`; None when the budget has no room.
        """
        key, reserved = request_key(request), math.ceil(usd * NANO)
        with self.together():
            (spent,) = self.database.execute("SELECT spent FROM total").fetchone()
            if limit_usd is not None and spent + reserved > math.floor(limit_usd * NANO):
                return None
            self.database.execute("UPDATE total SET spent = spent + ?", (reserved,))
            self.database.execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?)", (key, canonical(request))
            )
            cursor = self.database.execute(
                "INSERT INTO intents (key, slots, reserved, started, batch) VALUES (?, ?, ?, ?, ?)",
                (key, json.dumps(list(slots)), reserved, time.time(), batch),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def store(
        self,
        intent: int,
        raw: str,
        *,
        attempts: int,
        latency_s: float,
        request_id: str | None = None,
    ) -> None:
        """Commits the body of an answer, unread. Its reservation still counts as spent.

        An intent has one answer: what arrives for it again is left out.
        """
        with self.together():
            found = self.database.execute(
                "SELECT key, slots FROM intents WHERE id = ? AND spent IS NULL", (intent,)
            ).fetchone()
            if found is None:
                return
            key, slots = found
            self.database.execute(
                "INSERT OR IGNORE INTO answers "
                "(intent, key, slots, raw, sha256, attempts, latency_s, received, request_id) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(intent, key, slots, raw, answer_hash(key, slots, raw)),
                    *(attempts, latency_s, time.time(), request_id),
                ),
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
        with self.together():
            self._book(intent, usd)
            self.database.execute(
                "UPDATE answers SET served_model = ?, usage = ?, finish_reasons = ? "
                "WHERE intent = ?",
                (served_model, json.dumps(usage), json.dumps(list(finish_reasons)), intent),
            )

    def fail(
        self, intent: int, kind: str, detail: str, *, usd: float | None, final: bool = False
    ) -> None:
        """Books a request that brought no answer; a body stored for it moves to the failures.

        Args:
          intent: The request.
          kind: What went wrong, in a word or two.
          detail: What was received instead, as far as it is known.
          usd: 0.0 when surely not billed; None when unknown, which leaves the reservation spent.
          final: Whether asking again would bring the same.
        """
        row = (kind, detail[:_LONGEST_DETAIL], time.time(), final, intent)
        with self.together():
            self._book(intent, usd)
            self.database.execute("DELETE FROM answers WHERE intent = ?", (intent,))
            self.database.execute(
                "INSERT INTO failures SELECT id, key, ?, ?, ?, ? FROM intents WHERE id = ?", row
            )

    def give_up(self, key: str) -> None:
        """Marks a request's failures as final: it is not asked again."""
        with self.together():
            self.database.execute("UPDATE failures SET final = 1 WHERE key = ?", (key,))

    def _book(self, intent: int, usd: float | None) -> None:
        """Closes an intent; the total loses what was reserved beyond the cost.

        Warns once when it is the other way round: the budget was checked against the reservation.
        """
        spent = None if usd is None else math.ceil(usd * NANO)
        closed = self.database.execute(
            "UPDATE intents SET spent = coalesce(?, reserved) WHERE id = ? AND spent IS NULL",
            (spent, intent),
        )
        assert closed.rowcount == 1, f"intent {intent} is unknown or already closed"
        (beyond,) = self.database.execute(
            "SELECT spent - reserved FROM intents WHERE id = ?", (intent,)
        ).fetchone()
        self.database.execute("UPDATE total SET spent = spent + ?", (beyond,))
        if beyond > 0 and not self._overrun:
            self._overrun = True
            log.warning(
                "a request cost %.6f US dollars more than its tokens at most should: what is "
                "spent can pass teacher.budget_usd.",
                beyond / NANO,
            )

    def answers(self, key: str) -> list[Stored]:
        """The raw answers to a request, in the order they were asked.

        One whose text is not what was stored is left out, with a warning.
        """
        with translated(self.path):
            rows = self.database.execute(
                "SELECT intent, answers.slots, raw, sha256, spent IS NOT NULL FROM answers "
                "JOIN intents ON intents.id = intent WHERE answers.key = ? ORDER BY intent",
                (key,),
            ).fetchall()
        found = []
        for intent, slots, raw, sha256, settled in rows:
            if answer_hash(key, slots, raw) == sha256:
                found.append(Stored(intent, tuple(json.loads(slots)), raw, bool(settled)))
            elif intent not in self._reported:
                self._reported.add(intent)
                log.warning(
                    "answer %d of %s was changed after it came and is not used; "
                    "see distill-jax ledger verify.",
                    intent,
                    self.path,
                )
        return found

    def num_failures(self, key: str, kinds: Sequence[str]) -> tuple[int, bool]:
        """How often a request failed in these ways, and whether it need not be asked again.

        In one batch it fails once, however many of its samples do.
        """
        number, final = self.database.execute(
            "SELECT count(DISTINCT coalesce(-batch, id)) "
            "FILTER (WHERE kind IN (SELECT value FROM json_each(?))), coalesce(max(final), 0) "
            "FROM failures JOIN intents ON id = intent WHERE failures.key = ?",
            (json.dumps(kinds), key),
        ).fetchone()
        return number, bool(final)

    def dialect(self, endpoint: str, model: str) -> str | None:
        """What was learned about how a model wants to be asked, as `learned` was given it."""
        row = self.database.execute(
            "SELECT dialect FROM dialects WHERE endpoint = ? AND model = ?", (endpoint, model)
        ).fetchone()
        return row[0] if row else None

    def learned(self, endpoint: str, model: str, dialect: str) -> None:
        """Remembers how a model wants to be asked."""
        with self.together():
            self.database.execute(
                "INSERT OR REPLACE INTO dialects VALUES (?, ?, ?)", (endpoint, model, dialect)
            )

    @property
    def spent_usd(self) -> float:
        """US dollars spent or possibly spent."""
        (spent,) = self.database.execute("SELECT spent FROM total").fetchone()
        return spent / NANO


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """What SQLite says of the disk becomes an `OSError`, of a damaged file a `ValueError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGE:
            raise ValueError(
                f"{path} is not a ledger, or is damaged: {error}. Nothing in it has been touched. "
                "Save a copy before anything else; `sqlite3 FILE .recover` reads what is left."
            ) from None
        if code in _DISK_ERRORS:
            message = f"the ledger {path} can't be written: {error}"
            raise OSError(_DISK_ERRORS[code], message) from error
        raise


def answer_hash(key: str, slots: str, raw: str) -> str:
    """The SHA-256 by which an answer is recognised as the one that came."""
    return hashlib.sha256("\n".join((key, slots, raw)).encode()).hexdigest()
