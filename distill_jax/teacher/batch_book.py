"""Batches in the ledger: which have been handed in, and which requests are in them.

A batch is written down before it is handed in, and its name at the provider when that is known. So
one that was handed in by a process which died right then is found again by its label.
"""

import json
import time
import uuid
from dataclasses import dataclass

from distill_jax.teacher.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that were handed in together.

    Attributes:
      id: In the ledger.
      label: Our name for it, which the provider keeps as metadata.
      remote: The provider's name for it; None if it may not have been handed in.
    """

    id: int
    label: str
    remote: str | None


def open_batch(ledger: Ledger, endpoint: str) -> Batch:
    """Notes that a batch is about to be handed in."""
    label = uuid.uuid4().hex
    with ledger.together():
        cursor = ledger.database.execute(
            "INSERT INTO batches (endpoint, label, made) VALUES (?, ?, ?)",
            (endpoint, label, time.time()),
        )
    assert cursor.lastrowid is not None
    return Batch(cursor.lastrowid, label, None)


def handed_in(ledger: Ledger, batch: Batch, remote: str) -> Batch:
    """Notes what the provider calls it."""
    with ledger.together():
        ledger.database.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, batch.id))
    return Batch(batch.id, batch.label, remote)


def close_batch(ledger: Ledger, batch: Batch) -> None:
    """Notes that all its requests are booked."""
    with ledger.together():
        ledger.database.execute("UPDATE batches SET done = 1 WHERE id = ?", (batch.id,))


def open_batches(ledger: Ledger, endpoint: str) -> list[Batch]:
    """Those whose requests are not all booked."""
    rows = ledger.database.execute(
        "SELECT id, label, remote FROM batches WHERE endpoint = ? AND NOT done ORDER BY id",
        (endpoint,),
    )
    return [Batch(*row) for row in rows]


def open_intents(ledger: Ledger, batch: Batch) -> list[tuple[int, list[int], str]]:
    """The requests of a batch that are not booked yet: intent, slots, the request as JSON."""
    rows = ledger.database.execute(
        "SELECT id, slots, request FROM intents JOIN requests USING (key) "
        "WHERE batch = ? AND spent IS NULL ORDER BY id",
        (batch.id,),
    )
    return [(intent, json.loads(slots), request) for intent, slots, request in rows]
