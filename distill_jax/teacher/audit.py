"""Looks after a ledger: totals, what is wrong with it, its rows as JSONL, its garbage."""

import contextlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.teacher.ledger import (
    BUSY_S,
    LENIENT_TEXT,
    NANO,
    Ledger,
    answer_hash,
    request_key,
    translated,
)
from distill_jax.teacher.reply import read_reasoning


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
        database.text_factory = LENIENT_TEXT
        yield database


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What a ledger says of one model at one endpoint.

    Attributes:
      endpoint, model: As asked.
      served_models: How those that answered call themselves.
      finish_reasons: Choices by the reason why they ended, as sent; `""` where none was.
      num_answers: Requests that brought an answer.
      num_estimated: Of these, how many did not say what they used: their reservation stays spent.
      spent_usd: For these answers.
    """

    endpoint: str
    model: str
    served_models: tuple[str, ...]
    finish_reasons: Mapping[str, int]
    num_answers: int
    num_estimated: int
    spent_usd: float


def read_model_uses(path: Path) -> list[ModelUse]:
    """Answers and spending by endpoint and model; raises as `read_totals`."""
    with opened_for_reading(path) as database:
        rows = database.execute(
            "SELECT json_extract(request, '$.endpoint'), json_extract(request, '$.body.model'), "
            "served_model, finish_reasons, usage IS NULL OR usage = 'null', count(*), "
            "sum(coalesce(spent, reserved)) "
            "FROM answers JOIN intents ON intents.id = intent "
            "JOIN requests ON requests.key = answers.key GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3"
        ).fetchall()
    grouped: dict[tuple[str, str], list[tuple]] = {}
    for endpoint, model, *rest in rows:
        grouped.setdefault((endpoint, model), []).append(tuple(rest))
    return [_model_use(endpoint, model, rest) for (endpoint, model), rest in grouped.items()]


def _model_use(endpoint: str, model: str, rows: Sequence[tuple]) -> ModelUse:
    reasons: Counter[str] = Counter()
    for _, sent, _, number, _ in rows:
        for reason in json.loads(sent or "[]"):
            reasons[reason or ""] += number
    return ModelUse(
        endpoint=endpoint,
        model=model,
        served_models=tuple(sorted({served for served, *_ in rows if served})),
        finish_reasons=dict(sorted(reasons.items())),
        num_answers=sum(number for *_, number, _ in rows),
        num_estimated=sum(number for _, _, estimated, number, _ in rows if estimated),
        spent_usd=sum(spent for *_, spent in rows) / NANO,
    )


def read_failures(path: Path) -> dict[str, int]:
    """How many requests brought no answer, by what went wrong; raises as `read_totals`."""
    with opened_for_reading(path) as database:
        return dict(
            database.execute(
                "SELECT kind, count(*) FROM failures GROUP BY kind ORDER BY count(*) DESC, kind"
            ).fetchall()
        )


def verify(path: Path) -> list[str]:
    """Reads every page and row of a ledger and says what is wrong with it.

    Checked are the file itself, every key and every answer against its hash, that each answer and
    each failure has its intent and no intent both, and that the money adds up.

    Returns:
      A sentence for each problem; empty for a sound ledger.

    Raises:
      FileNotFoundError: there is no ledger at `path`.
      ValueError: the file is too damaged to be read.
    """
    with opened_for_reading(path) as database:
        problems = [
            f"the file is damaged: {line}"
            for (line,) in database.execute("PRAGMA integrity_check")
            if line != "ok"
        ]
        for key, request in database.execute("SELECT key, request FROM requests"):
            if not _is_request(key, request):
                problems.append(f"request {key} is not the one that was sent.")
        for intent, key, slots, raw, sha256 in database.execute(
            "SELECT intent, key, slots, raw, sha256 FROM answers"
        ):
            if answer_hash(key, slots, raw) != sha256:
                problems.append(f"answer {intent} is not the one that came; it is not used.")
        for what, query in _CHECKS.items():
            (number,) = database.execute(query).fetchone()
            if number:
                problems.append(f"{number} {what}.")
    return problems


def _is_request(key: str, text: str) -> bool:
    try:
        return request_key(json.loads(text)) == key
    except ValueError:
        return False


_CHECKS = {
    "answers or failures belong to no request that was sent": (
        "SELECT (SELECT count(*) FROM answers WHERE intent NOT IN (SELECT id FROM intents)) + "
        "(SELECT count(*) FROM failures WHERE intent NOT IN (SELECT id FROM intents))"
    ),
    "requests have both an answer and a failure": (
        "SELECT count(*) FROM answers JOIN failures USING (intent)"
    ),
    "answers belong to another request than they say": (
        "SELECT count(*) FROM answers JOIN intents ON id = intent WHERE answers.key != intents.key"
    ),
    "answers have lost the text of their request": (
        "SELECT count(*) FROM answers WHERE key NOT IN (SELECT key FROM requests)"
    ),
    "billionths of a dollar are not accounted for": (
        "SELECT abs((SELECT spent FROM total) - "
        "(SELECT coalesce(sum(coalesce(spent, reserved)), 0) FROM intents))"
    ),
}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every answer with all that is known of it, in the order asked; raises as `read_totals`.

    The body is given as it came. Reasoning that came beside a text is given apart from it. The
    request is given as it would be without a dialect, in ledgers of old as it was sent.
    """
    with opened_for_reading(path) as database:
        cursor = database.execute(
            "SELECT intent, answers.key, request, answers.slots, raw, served_model, usage, "
            "finish_reasons, coalesce(spent, reserved), spent IS NOT NULL, attempts, latency_s, "
            "request_id, started, received FROM answers JOIN intents ON intents.id = intent "
            "JOIN requests ON requests.key = answers.key ORDER BY intent"
        )
        for row in cursor:
            fields = dict(zip(_FIELDS, row, strict=True))
            for name in ("request", "slots", "usage", "finish_reasons"):
                fields[name] = json.loads(fields[name] or "null")
            fields["spent_usd"] /= NANO
            fields["settled"] = bool(fields["settled"])
            yield {**fields, "reasoning": read_reasoning(fields["raw"])}


_FIELDS = (
    *("intent", "key", "request", "slots", "raw", "served_model", "usage", "finish_reasons"),
    *("spent_usd", "settled", "attempts", "latency_s", "request_id", "started", "received"),
)


def export(path: Path, to: Path) -> int:
    """Writes `read_rows` as JSONL, whole or not at all; returns how many rows.

    Raises:
      FileNotFoundError, ValueError: as `read_totals`.
      OSError: `to` can't be written.
    """
    number = 0
    beside = to.with_name(f".{to.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        for row in read_rows(path):
            file.write(json.dumps(row) + "\n")
            number += 1
        file.flush()
        os.fsync(file.fileno())
    beside.replace(to)
    directory = os.open(to.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return number


def collect_garbage(path: Path) -> dict[str, int]:
    """Gives back the room of what no answer and no sum needs any more.

    Failures are forgotten, so that prompts which were given up are asked again; so are the texts
    of requests that have no answer. Answers and spending stay. Nobody else may be writing.

    Returns:
      `failures` and `requests`: how many were forgotten; `bytes`: how much smaller the file is.

    Raises:
      FileNotFoundError, ValueError, OSError: as `Ledger`.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no ledger at {path}.")
    before = path.stat().st_size
    with Ledger(path) as ledger:
        with ledger.together():
            failures = ledger.database.execute("DELETE FROM failures").rowcount
            requests = ledger.database.execute(
                "DELETE FROM requests WHERE key NOT IN (SELECT key FROM answers) "
                "AND key NOT IN (SELECT key FROM intents WHERE spent IS NULL)"
            ).rowcount
        with translated(path):
            ledger.database.execute("VACUUM")
            ledger.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return {"failures": failures, "requests": requests, "bytes": before - path.stat().st_size}
