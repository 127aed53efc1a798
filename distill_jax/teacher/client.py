"""Asks a teacher over HTTP: one request and its faults, then many at once.

Whatever speaks the OpenAI chat protocol is a teacher. Every answer is in the ledger before it is
read, and what the ledger holds is never asked again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from random import Random

import openai

from distill_jax.config import TeacherConfig
from distill_jax.records import Completion
from distill_jax.teacher.account import Account, Request
from distill_jax.teacher.governor import PATIENCE, Patience, Tries
from distill_jax.teacher.ledger import Ledger, Stored
from distill_jax.teacher.reply import Fault, TeacherError, TeacherUnavailable, diagnose

log = logging.getLogger(__name__)

Advance = Callable[[int, str], None]

_NO_KEY = "EMPTY"  # sent to servers that need none
_CONNECT_S = 10.0


class TeacherClient:
    """A teacher at an address; asks only for what its ledger doesn't hold.

    Args:
      config: Model, sampling, samples per prompt, concurrency, price and budget.
      ledger: Where requests, answers and spending are kept.
      url: The base URL, such as `"https://api.openai.com/v1"`; for the tutor, where it listens.
      free: Whether the endpoint needs neither price nor key. If it has them they are used.
      first_slot: Of the samples asked for; another one asks the same prompt for other samples.
      patience: How long a prompt is tried.

    Raises:
      ValueError: the endpoint is not free and has no price.
      CredentialsRefused: the endpoint is not free and the key's environment variable is not set.
    """

    def __init__(
        self,
        config: TeacherConfig,
        ledger: Ledger,
        *,
        url: str,
        free: bool,
        first_slot: int = 0,
        patience: Patience = PATIENCE,
    ):
        self._account = Account(config, ledger, url=url, free=free, first_slot=first_slot)
        self._concurrency, self._patience = config.concurrency, patience
        self._url, self._free = url, free

    def complete(
        self, prompts: Sequence[str], *, advance: Advance = lambda *_: None
    ) -> list[tuple[Completion, ...]]:
        """Completes each prompt `config.samples` times.

        Args:
          prompts: P prompts. Equal ones are asked once and share their answers.
          advance: Told how many more prompts are done, and what has been spent.

        Returns:
          P tuples of exactly `config.samples` completions, in order. An answer that never came is
          an empty completion with finish reason `error`.

        Raises:
          TeacherError: the budget, the quota, the key or the server ended it; the class says
            which. Requests in flight have been awaited; their answers, like all before, are in
            the ledger, and the same call goes on from there.
        """
        account = self._account
        requests = [account.request(prompt) for prompt in prompts]
        different = {request.key: request for request in requests}.values()
        todo = [request for request in different if account.missing(request)]
        advance(len(requests) - len(todo), _spent(account))
        if todo:
            asyncio.run(self._ask(todo, advance))
        failed = Completion("", "error", 0)
        answers = [account.answers(request) for request in requests]
        return [tuple(found.get(slot, failed) for slot in account.slots) for found in answers]

    async def _ask(self, requests: Sequence[Request], advance: Advance) -> None:
        timeout = openai.Timeout(self._patience.request_s, connect=_CONNECT_S)
        async with openai.AsyncOpenAI(
            base_url=self._url,
            api_key=self._account.secret or _NO_KEY,
            max_retries=0,  # there is one owner of retries, and it is `_Asking`
            timeout=timeout,
            # a proxy for the outside world can't reach a server on this machine
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not self._free, timeout=timeout),
        ) as transport:
            asking = _Asking(self._account, transport, self._patience)
            await asking.ask(requests, concurrency=self._concurrency, advance=advance)


class _Asking:
    """One call of `complete`: what its workers share."""

    def __init__(self, account: Account, transport: openai.AsyncOpenAI, patience: Patience):
        self._account, self._transport, self._patience = account, transport, patience
        self._random = Random()
        self._error: TeacherError | None = None
        self._stopping = asyncio.Event()
        self._in_flight = 0
        self._landed = asyncio.Event()  # something in flight came to its end
        self._quiet_until = 0.0  # monotonic seconds: the server asked everyone to wait
        self._failed_in_a_row = 0

    async def ask(self, requests: Sequence[Request], *, concurrency: int, advance: Advance) -> None:
        """Finishes all requests, or raises what stopped it once nothing is in flight any more."""
        queue = iter(requests)
        workers = min(concurrency, len(requests))
        await asyncio.gather(*(self._work(queue, advance) for _ in range(workers)))
        if self._error is not None:
            raise self._error

    async def _work(self, queue: Iterator[Request], advance: Advance) -> None:
        for request in queue:
            try:
                await self._finish(request)
            except TeacherError as error:
                self._error = self._error or error
                self._stopping.set()
            if self._stopping.is_set():
                return
            advance(1, _spent(self._account))

    async def _finish(self, request: Request) -> None:
        """Asks until every slot is answered or patience runs out."""
        patience, tries, attempts = self._patience, Tries(), 0
        deadline = time.monotonic() + patience.total_s
        while (missing := self._account.missing(request)) and not self._stopping.is_set():
            await self._sleep(self._quiet_until - time.monotonic())
            # once some are answered the rest are asked one by one: the server may ignore `n`
            slots = missing if len(missing) == len(self._account.slots) else missing[:1]
            attempts += 1
            fault = await self._attempt(request, slots, attempts=attempts)
            if fault is None:
                self._failed_in_a_row = 0
                continue
            wait = tries.next_wait(fault, patience, self._random)
            if wait is None or time.monotonic() + wait > deadline:
                self._give_up(fault, attempts)
                return
            if fault.kind == "rate limit":
                self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
            await self._sleep(wait)

    async def _attempt(
        self, request: Request, slots: Sequence[int], *, attempts: int
    ) -> Fault | None:
        """Sends one request and books its end; returns the fault if that is what came back.

        Raises:
          TeacherError: nothing more must be sent. If this one was sent, it has been booked.
        """
        intent = await self._reserve(request, slots)
        if intent is None:
            return None
        account, started = self._account, time.monotonic()
        self._in_flight += 1
        try:
            # unlike the transport's own limit this one ends an answer that comes drop by drop
            async with asyncio.timeout(self._patience.request_s):
                raw = await self._send(request, num_samples=len(slots))
        except (openai.APIConnectionError, openai.APIStatusError, TimeoutError) as error:
            end = diagnose(error)
            if isinstance(end, Fault):
                usd = None if end.billed else 0.0
                account.ledger.fail(intent, end.kind, account.redact(end.detail), usd=usd)
                return end
            message = account.printable(str(end))
            account.ledger.fail(intent, type(end).__name__, message, usd=0.0)
            raise type(end)(message) from None
        finally:
            self._in_flight -= 1
            self._landed.set()
        latency_s = time.monotonic() - started
        account.ledger.store(intent, raw, attempts=attempts, latency_s=latency_s)
        return account.settle(Stored(intent, tuple(slots), raw, settled=False))

    async def _send(self, request: Request, *, num_samples: int) -> str:
        """The body of the answer, unread but for the key, should the server have echoed it."""
        several = num_samples if num_samples > 1 else openai.omit  # some servers don't know `n`
        response = await self._transport.chat.completions.with_raw_response.create(
            **request.body, n=several
        )
        return self._account.redact(response.content.decode(errors="replace"))

    async def _reserve(self, request: Request, slots: Sequence[int]) -> int | None:
        """An intent within the budget; waits while requests in flight may turn out cheaper.

        Returns:
          The intent; None if everything stopped meanwhile.

        Raises:
          BudgetReached: nothing is in flight any more and the request still doesn't fit.
        """
        while not self._stopping.is_set():
            intent = self._account.reserve(request, slots)
            if intent is not None:
                return intent
            if not self._in_flight:
                raise self._account.over_budget()
            self._landed.clear()
            await self._landed.wait()
        return None

    def _give_up(self, fault: Fault, attempts: int) -> None:
        """Leaves a prompt unanswered.

        Raises:
          TeacherUnavailable: it would not fare better with the next prompt.
        """
        detail = self._account.printable(fault.detail)
        if fault.kind == "rate limit" and fault.retry_after_s is not None:
            raise TeacherUnavailable(
                f"the teacher at {self._account.endpoint} asks to wait {fault.retry_after_s:.0f} "
                f"seconds; run the same command again then. {detail}"
            )
        log.warning("no answer after %d requests: %s: %s", attempts, fault.kind, detail)
        if fault.kind == "refused prompt":
            return  # says nothing about the server
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._patience.failed_prompts:
            raise TeacherUnavailable(
                f"the teacher at {self._account.endpoint} left {self._failed_in_a_row} prompts in "
                f"a row unanswered; run the same command again when it is back. {detail}"
            )

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, unless everything stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _spent(account: Account) -> str:
    spent = account.ledger.spent_usd
    return f"${spent:.2f} spent" if spent else ""
