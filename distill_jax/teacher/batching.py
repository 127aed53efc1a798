"""The same prompts by a provider's Batch API: handed in together, collected when they are done.

Cheaper, and slower by up to a day. Requests, ledger and budget are those of `asking`; only the way
there differs. What a process leaves out when it ends is collected by the next, also one by chat.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any, TypeVar

import openai
from openai.types import Batch as RemoteBatch

from distill_jax.teacher import batch_book
from distill_jax.teacher.account import Account, Ask, Request
from distill_jax.teacher.asking import Desk
from distill_jax.teacher.batch_book import Batch
from distill_jax.teacher.governor import Tries
from distill_jax.teacher.ledger import Ledger, Stored
from distill_jax.teacher.reply import (
    CredentialsRefused,
    Fault,
    RequestRefused,
    TeacherError,
    TeacherUnavailable,
    diagnose,
    diagnose_reply,
    diagnose_status,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

_URL = "/v1/chat/completions"
_LABEL = "distill_jax"  # the name of our label in a batch's metadata
_MOST_LINES, _MOST_BYTES = 50_000, 100 << 20  # of one batch; what most providers take
_OVER = ("completed", "failed", "expired", "cancelled")
_NOT_ASKED = ("batch_expired", "batch_cancelled")  # why a line has no answer


class Batching:
    """Hands in what has no answer, collects what is done, and begins again with the rest.

    Args:
      desk: The endpoint.
      finished: Told after each prompt.
      tell: Told in words how far a batch is.
    """

    def __init__(self, desk: Desk, finished: Callable[[], None], tell: Callable[[str], None]):
        self._desk, self._finished, self._tell = desk, finished, tell
        self._random = Random()
        self._stopping = asyncio.Event()
        self._error: TeacherError | None = None
        self._asked: Counter[str] = Counter()  # in how many batches, by key
        self._fruitless = 0  # batches in a row that brought no answer and taught nothing
        self.num_in_flight = 0

    def stop(self, error: TeacherError) -> None:
        """Waits no longer; what is handed in stays so, and is collected by the next call."""
        self._error = self._error or error
        self._stopping.set()

    async def collect(self) -> None:
        """Books the batches that a former process left out, once they are over.

        What they hold is paid for, so they come first, however the rest is asked. Raises as `ask`.
        """
        desk = self._desk
        for batch in batch_book.open_batches(desk.ledger, desk.account.endpoint):
            found = await self._find_again(batch)
            if found is not None:
                log.warning("batch %s first: nothing is asked until it is over.", found.remote)
                await self._collect(found)
            self._check()

    async def ask(self, asks: Sequence[Ask]) -> None:
        """Finishes all asks; raises as `Asking.ask`."""
        todo: Sequence[int] = range(len(asks))
        while todo := [index for index in todo if self._is_open(asks[index])]:
            self._check()
            batch = await self._hand_in(asks[index] for index in todo)
            await self._collect(batch)

    def _is_open(self, ask: Ask) -> bool:
        """Whether an ask needs another batch; tells of it when it doesn't."""
        desk, request = self._desk, self._desk.account.request(ask)
        if (
            desk.account.missing(desk.ledger, request)
            and not desk.account.hopeless(desk.ledger, request, desk.patience)
            and self._asked[request.key] < desk.patience.attempts
        ):
            return True
        self._finished()
        return False

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._fruitless >= self._desk.patience.bad_answers:
            raise TeacherUnavailable(
                f"{self._fruitless} batches in a row brought no answer from "
                f"{self._desk.account.endpoint}; run the same command again later."
            )

    async def _hand_in(self, asks: Iterable[Ask]) -> Batch:
        """A new batch with as many requests as the budget and the provider allow."""
        desk = self._desk
        desk.clerk.check_room()
        batch = await desk.clerk.write(
            lambda ledger: batch_book.open_batch(ledger, desk.account.endpoint)
        )
        lines: list[bytes] = []
        size, keys = 0, set()
        for request, slots in _parts(desk.account, desk.ledger, asks):
            intent = await desk.clerk.write(
                lambda ledger, request=request, slots=slots: desk.account.reserve(
                    ledger, request, slots, batch=batch.id
                )
            )
            if intent is None:
                break
            keys.add(request.key)
            lines.append(_line(intent, request, len(slots)))
            size += len(lines[-1])
            if len(lines) == _MOST_LINES or size >= _MOST_BYTES:
                break
        if not lines:
            await desk.clerk.write(lambda ledger: batch_book.close_batch(ledger, batch))
            raise desk.account.over_budget(desk.ledger)
        self._asked.update(keys)
        return await self._submit(batch, b"".join(lines))

    async def _submit(self, batch: Batch, lines: bytes) -> Batch:
        client = self._desk.transport.client
        try:
            file = await self._patiently(
                lambda: client.files.create(file=("requests.jsonl", lines), purpose="batch")
            )

            async def create() -> RemoteBatch:
                # an earlier try may have come through although its answer did not
                return await self._search(batch) or await client.batches.create(
                    input_file_id=file.id,
                    endpoint=_URL,
                    completion_window="24h",
                    metadata={_LABEL: batch.label},
                )

            remote = await self._patiently(create)
        except RequestRefused as error:
            await self._drop(batch, "batch refused", usd=0.0)
            raise RequestRefused(
                f"the Batch API of {self._desk.account.endpoint} refused, if there is one; "
                f"teacher.mode=chat works without. {error}"
            ) from None
        return await self._desk.clerk.write(
            lambda ledger: batch_book.handed_in(ledger, batch, remote.id)
        )

    async def _search(self, batch: Batch) -> RemoteBatch | None:
        """The provider's batch with our label."""
        async for remote in self._desk.transport.client.batches.list(limit=100):
            if (remote.metadata or {}).get(_LABEL) == batch.label:
                return remote
        return None

    async def _find_again(self, batch: Batch) -> Batch | None:
        """A batch of a former process; None if that one never handed it in."""
        if batch.remote is not None:
            return batch
        try:
            remote = await self._patiently(lambda: self._search(batch))
        except RequestRefused:  # there is no Batch API: it can't have been handed in
            remote = None
        if remote is None:
            await self._drop(batch, "never handed in", usd=0.0)
            return None
        return await self._desk.clerk.write(
            lambda ledger: batch_book.handed_in(ledger, batch, remote.id)
        )

    async def _collect(self, batch: Batch) -> None:
        """Waits for a batch and books every request in it."""
        remote = await self._awaited(batch)
        texts = [
            await self._patiently(lambda name=name: self._content(name))
            for name in (remote.output_file_id, remote.error_file_id)
            if name
        ]
        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        before = self._desk.account.dialect
        ends = await self._book(batch, lines)
        if remote.status == "completed":  # then nobody can say what became of the rest
            await self._drop(batch, "missing from its batch", usd=None)
        else:
            problem = "; ".join(
                e.message or "" for e in (remote.errors and remote.errors.data) or []
            )
            await self._drop(batch, f"batch {remote.status}", problem, usd=0.0)
            log.warning("a batch ended as %s: %s", remote.status, self._printable(problem))
        taught = self._desk.account.dialect != before
        if taught:  # what is learned ends, so this can't go on for ever
            self._asked.clear()
        self._fruitless = 0 if taught or None in ends else self._fruitless + 1
        stops = [end for end in ends if isinstance(end, TeacherError)]
        if stops:
            raise self._desk.account.told(stops[0])

    async def _awaited(self, batch: Batch) -> RemoteBatch:
        """A batch once it is over."""
        assert batch.remote is not None
        name, pause = batch.remote, self._desk.patience.poll_s
        client = self._desk.transport.client
        open_intents = batch_book.open_intents(self._desk.ledger, batch)
        self.num_in_flight = len(open_intents)
        while True:
            remote = await self._patiently(lambda: client.batches.retrieve(name))
            if remote.status in _OVER:
                self.num_in_flight = 0
                return remote
            counts = remote.request_counts
            self._tell(f"{counts.completed if counts else 0} of {len(open_intents)} in a batch")
            await self._sleep(pause)
            self._check()
            pause = min(2.0 * pause, self._desk.patience.longest_backoff_s)

    async def _content(self, name: str) -> str:
        content = await self._desk.transport.client.files.content(name)
        return content.content.decode(errors="replace")

    async def _book(self, batch: Batch, lines: Sequence[str]) -> list[Fault | TeacherError | None]:
        """Books what came back, in any order; returns how each request ended."""
        spoken = self._desk.account.dialect  # since the batch was handed in
        sent = {
            str(intent): (intent, slots, spoken.translate(json.loads(request)["body"]))
            for intent, slots, request in batch_book.open_intents(self._desk.ledger, batch)
        }
        ends, strange = [], 0
        for line in lines:
            row = _read_line(line)
            if row.get("custom_id") not in sent:
                strange += 1  # not ours, or told a second time
                continue
            intent, slots, body = sent.pop(row["custom_id"])
            ends.append(await self._book_one(intent, slots, body, row))
        if strange:
            log.warning("%d lines of a batch answer no request, or one twice.", strange)
        return ends

    async def _book_one(
        self, intent: int, slots: Sequence[int], body: dict[str, Any], row: dict[str, Any]
    ) -> Fault | TeacherError | None:
        desk, account = self._desk, self._desk.account
        response = row.get("response") or {}
        status, answer = response.get("status_code", 0), response.get("body")
        if status == 200:
            raw = account.secret.hide(json.dumps(answer))
            await desk.clerk.store(
                intent, raw, attempts=1, latency_s=0.0, request_id=response.get("request_id")
            )
            stored = Stored(intent, tuple(slots), raw, settled=False)
            limit = body.get("max_tokens") or body["max_completion_tokens"]
            reply = await desk.clerk.write(
                lambda ledger: account.settle(ledger, stored, max_tokens=limit)
            )
            return diagnose_reply(reply)
        error = answer.get("error", answer) if isinstance(answer, dict) else row.get("error")
        if status:
            end = diagnose_status(status, error, {}, json.dumps(error))
        else:
            not_asked = isinstance(error, dict) and error.get("code") in _NOT_ASKED
            kind = "not asked" if not_asked else "server error"
            end = Fault(kind, json.dumps(error), billed=False)
        await desk.clerk.write(lambda ledger: account.fail(ledger, intent, end))
        if isinstance(end, RequestRefused | CredentialsRefused):
            learned = await desk.clerk.write(
                lambda ledger: account.learn(ledger, body, num_samples=len(slots), error=error)
            )
            if learned:
                return Fault("server error", "asked another way next time", billed=False)
        return end

    async def _drop(self, batch: Batch, kind: str, detail: str = "", *, usd: float | None) -> None:
        """Books the requests of a batch that brought nothing, and closes it."""
        intents = batch_book.open_intents(self._desk.ledger, batch)

        def drop(ledger: Ledger) -> None:
            for intent, _, _ in intents:
                ledger.fail(intent, kind, self._printable(detail), usd=usd)
            batch_book.close_batch(ledger, batch)

        await self._desk.clerk.write(drop)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Calls until it works; raises what would not go away, or when it takes too long.

        A key that is refused is read again, once.
        """
        tries, begun, secret = Tries(), time.monotonic(), self._desk.account.secret
        key = secret.value
        while True:
            try:
                return await call()
            except (openai.APIConnectionError, openai.APIStatusError, TimeoutError) as error:
                end = diagnose(error)
            may_be_new = isinstance(end, CredentialsRefused) and secret.value == key
            if may_be_new and await asyncio.to_thread(secret.read_again):
                continue
            if isinstance(end, TeacherError):
                raise self._desk.account.told(end)
            wait = tries.next_wait(end, self._desk.patience, self._random)
            if wait is None or time.monotonic() - begun + wait > self._desk.patience.outage_s:
                raise TeacherUnavailable(
                    f"the Batch API of {self._desk.account.endpoint} can't be reached; run the "
                    f"same command again later. {self._printable(end.detail)}"
                )
            await self._sleep(wait)
            self._check()

    def _printable(self, text: str) -> str:
        return self._desk.account.printable(text)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _parts(
    account: Account, ledger: Ledger, asks: Iterable[Ask]
) -> Iterator[tuple[Request, list[int]]]:
    """What to send: all samples of a prompt at once, or one by one where they can't be."""
    for ask in asks:
        request = account.request(ask)
        missing = account.missing(ledger, request)
        if account.dialect.one_by_one or len(missing) < len(ask.slots):
            yield from ((request, [slot]) for slot in missing)
        else:
            yield request, missing


def _line(intent: int, request: Request, num_samples: int) -> bytes:
    several = {"n": num_samples} if num_samples > 1 else {}
    body = {**request.body, **several}
    row = {"custom_id": str(intent), "method": "POST", "url": _URL, "body": body}
    return json.dumps(row).encode() + b"\n"


def _read_line(line: str) -> dict[str, Any]:
    """A line of a result file; empty if it can't be read."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
