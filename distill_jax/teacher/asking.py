"""Many prompts at once: who may send, what is booked, what is tried again, and what stops all."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import openai

from distill_jax.records import Completion
from distill_jax.teacher.account import Account, Ask, Request
from distill_jax.teacher.clerk import Clerk
from distill_jax.teacher.governor import Governor, Patience, Tries
from distill_jax.teacher.ledger import Ledger, Stored
from distill_jax.teacher.reply import (
    CredentialsRefused,
    Fault,
    RequestRefused,
    TeacherError,
    TeacherUnavailable,
    diagnose,
    diagnose_reply,
)
from distill_jax.teacher.transport import Transport

log = logging.getLogger(__name__)

_SAME_IN_A_ROW = 5  # prompts whose samples are all alike, before the teacher is suspected


@dataclass(frozen=True, slots=True)
class Desk:
    """What is needed to ask one endpoint.

    Attributes:
      account: The endpoint.
      ledger: For reading; its thread is that of the event loop.
      clerk: For writing.
      transport: The connection.
      patience: How long a prompt is tried.
    """

    account: Account
    ledger: Ledger
    clerk: Clerk
    transport: Transport
    patience: Patience


class Asking:
    """Asks until every slot is answered or patience runs out; what its workers share.

    Args:
      desk: The endpoint.
      governor: How fast.
      finished: Told after each prompt.
    """

    def __init__(self, desk: Desk, governor: Governor, finished: Callable[[], None]):
        self._desk, self._governor, self._finished = desk, governor, finished
        self._random = Random()
        self._error: TeacherError | OSError | None = None
        self._stopping = asyncio.Event()
        self._gate = asyncio.Lock()  # first come, first sent
        self._changed = asyncio.Event()  # whoever waits at the gate should look again
        self._landed = asyncio.Event()  # a reservation was closed
        self._reserved = 0  # requests that have a reservation, or are about to
        self._key_lock = asyncio.Lock()
        self._key_worked = True
        self._num_given_up = 0
        self._same_in_a_row = 0.0
        self._anything_answered = False

    @property
    def num_in_flight(self) -> int:
        """Requests whose answer is awaited."""
        return self._governor.in_flight

    def stop(self, error: TeacherError | OSError) -> None:
        """Sends nothing more; `ask` raises the first such error once nothing is in flight."""
        self._error = self._error or error
        self._stopping.set()
        self._wake()

    async def ask(self, asks: Sequence[Ask], *, workers: int) -> None:
        """Finishes all asks.

        Raises:
          TeacherError: what stopped it, once nothing is in flight any more.
          OSError: the same, for the disk.
        """
        queue = iter(asks)
        await asyncio.gather(*(self._work(queue) for _ in range(min(workers, len(asks)))))
        if self._error is not None:
            raise self._error
        if self._num_given_up and not self._anything_answered:
            raise self._unavailable(f"left all of {self._num_given_up} prompts unanswered", "")

    async def _work(self, queue: Iterator[Ask]) -> None:
        for ask in queue:
            try:
                await self._finish(ask)
            except (TeacherError, OSError) as error:
                self.stop(error)
            if self._stopping.is_set():
                return
            self._finished()

    async def _finish(self, ask: Ask) -> None:
        """Asks for a prompt until every slot is answered or patience runs out."""
        desk, tries, attempts, deadline = self._desk, Tries(), 0, math.inf
        while not self._stopping.is_set():
            request = desk.account.request(ask)  # anew: the dialect may be another one
            found = desk.account.answers(desk.ledger, request)
            missing = [slot for slot in ask.slots if slot not in found]
            if not missing:
                self._note_samples([found[slot] for slot in ask.slots])
                return
            # once some are answered the rest are asked one by one: the server may ignore `n`
            alone = desk.account.dialect.one_by_one or len(missing) < len(ask.slots)
            attempts += 1
            fault = await self._attempt(request, missing[:1] if alone else missing, attempts)
            if fault is None:
                continue
            deadline = min(deadline, time.monotonic() + desk.patience.total_s)
            wait = tries.next_wait(fault, desk.patience, self._random)
            late = wait is None or time.monotonic() + wait > deadline
            if fault.kind == "rate limit":
                self._hold_back(fault, wait or 0.0, late=late)
            elif late:
                await self._give_up(request, fault, attempts)
                return
            else:
                await self._sleep(wait or 0.0)

    async def _attempt(self, request: Request, slots: Sequence[int], attempts: int) -> Fault | None:
        """Sends one request when it may go out; returns the fault if that is what came back.

        Raises:
          TeacherError: nothing more must be sent. If this one was sent, it has been booked.
          OSError: the disk is full. An answer that came has been saved.
        """
        tokens = request.likely_tokens(len(slots))
        intent = await self._reserve(request, slots, tokens)
        if intent is None:
            return None
        sent, fault, used = time.monotonic(), None, tokens
        try:
            fault, used = await self._send(request, intent, slots, attempts)
        finally:
            self._reserved -= 1
            unused = max(0, tokens - used)
            self._governor.land(fault, sent=sent, now=time.monotonic(), unused_tokens=unused)
            self._wake()
        return fault

    async def _reserve(self, request: Request, slots: Sequence[int], tokens: int) -> int | None:
        """An intent within the budget and the rate; None if everything stopped meanwhile.

        Waits while requests in flight may turn out cheaper than their reservation.

        Raises:
          BudgetReached: nothing is in flight any more and the request still doesn't fit.
        """
        desk = self._desk
        while await self._admitted(tokens):
            self._reserved += 1
            try:
                desk.clerk.check_room()
                intent = await desk.clerk.write(
                    lambda ledger: desk.account.reserve(ledger, request, slots)
                )
            except OSError:
                self._withdraw(tokens)
                raise
            if intent is not None:
                return intent
            self._withdraw(tokens)
            if not self._reserved:
                raise desk.account.over_budget(desk.ledger)
            self._landed.clear()
            await self._landed.wait()
        return None

    def _withdraw(self, tokens: int) -> None:
        self._reserved -= 1
        self._governor.withdraw(tokens, now=time.monotonic())

    async def _admitted(self, tokens: int) -> bool:
        """Waits for the governor; False if everything stopped meanwhile."""
        async with self._gate:
            while not self._stopping.is_set():
                now = time.monotonic()
                if self._governor.circuit.out(now=now):
                    raise self._unavailable("has been failing for too long", "")
                wait = self._governor.wait(tokens, now=now)
                if not wait:
                    self._governor.admit(tokens, now=now)
                    return True
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(wait) else wait):
                        await self._changed.wait()
        return False

    async def _send(
        self, request: Request, intent: int, slots: Sequence[int], attempts: int
    ) -> tuple[Fault | None, int]:
        """Sends a request that has been reserved and books its end.

        Returns:
          The fault, if that is what came back, and the tokens that were used.
        """
        desk, account = self._desk, self._desk.account
        key, start = account.secret.value, time.monotonic()
        try:
            raw = await desk.transport.send(request.body, samples=slots)
        except (openai.APIConnectionError, openai.APIStatusError, TimeoutError) as error:
            end = diagnose(error)
            await desk.clerk.write(lambda ledger: account.fail(ledger, intent, end))
            if isinstance(end, Fault):
                return end, 0
            if await self._mended(request, len(slots), end, key, getattr(error, "body", None)):
                return None, 0
            raise account.told(end) from None
        await desk.clerk.store(
            intent,
            raw.body,
            attempts=attempts,
            latency_s=time.monotonic() - start,
            request_id=raw.request_id,
        )
        stored = Stored(intent, tuple(slots), raw.body, settled=False)
        reply = await desk.clerk.write(
            lambda ledger: account.settle(ledger, stored, max_tokens=request.max_tokens)
        )
        end = diagnose_reply(reply)
        if isinstance(end, TeacherError):
            raise account.told(end)
        if end is None:
            self._key_worked = self._anything_answered = True
            if len(reply.completions) == 1 < len(slots) and not account.dialect.one_by_one:
                one_by_one = replace(account.dialect, one_by_one=True)
                await desk.clerk.write(lambda ledger: account.speak(ledger, one_by_one))
        return end, sum(reply.tokens or (0, request.likely_tokens(len(slots))))

    async def _mended(
        self, request: Request, num_samples: int, end: TeacherError, key: str, error: Any
    ) -> bool:
        """Whether a refusal that concerns every prompt can be helped: another dialect or key."""
        account = self._desk.account
        # some refuse a parameter with the status that others keep for keys
        if isinstance(end, RequestRefused | CredentialsRefused) and await self._desk.clerk.write(
            lambda ledger: account.learn(ledger, request.body, num_samples=num_samples, error=error)
        ):
            return True
        if isinstance(end, CredentialsRefused):
            async with self._key_lock:
                if account.secret.value != key:
                    return True
                if self._key_worked:  # a new key that never worked is not read yet again
                    self._key_worked = False
                    return await asyncio.to_thread(account.secret.read_again)
        return False

    async def _give_up(self, request: Request, fault: Fault, attempts: int) -> None:
        """Leaves a prompt unanswered; for ever, if that is not the fault of a server in trouble."""
        detail = self._desk.account.printable(fault.detail)
        log.warning("no answer after %d requests: %s: %s", attempts, fault.kind, detail)
        own_fault = fault.kind in ("refused prompt", "bad answer")
        if own_fault and self._governor.circuit.closed:
            await self._desk.clerk.write(lambda ledger: ledger.give_up(request.key))
        else:
            self._num_given_up += 1

    def _hold_back(self, fault: Fault, wait: float, *, late: bool) -> None:
        """Lets nobody send for a while: the server asked for it.

        Raises:
          TeacherUnavailable: it asked for too long a while, or too often.
        """
        asked = fault.retry_after_s
        if late or (asked or 0.0) > self._desk.patience.longest_retry_after_s:
            what = "refuses more requests" if asked is None else f"asks to wait {asked:.0f} seconds"
            raise self._unavailable(what, self._desk.account.printable(fault.detail))
        self._governor.quiet(wait, now=time.monotonic())

    def _unavailable(self, what: str, detail: str) -> TeacherUnavailable:
        return TeacherUnavailable(
            f"the teacher at {self._desk.account.endpoint} {what}; run the same command again "
            f"later: nothing is lost. {detail}".rstrip()
        )

    def _note_samples(self, completions: Sequence[Completion]) -> None:
        """Warns once when a teacher that should draw its answers at random does not."""
        if len(completions) < 2 or not self._desk.account.draws_samples:
            return
        same = len({completion.text for completion in completions}) == 1
        self._same_in_a_row = self._same_in_a_row + 1 if same else -math.inf
        if self._same_in_a_row == _SAME_IN_A_ROW:
            log.warning(
                "the teacher at %s is not sampling: all answers to a prompt are the same, and "
                "only one of them is kept. Set teacher.samples=1, or another teacher.temperature.",
                self._desk.account.endpoint,
            )

    def _wake(self) -> None:
        self._changed.set()
        self._landed.set()

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, unless everything stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
