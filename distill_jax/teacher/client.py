"""Asks a teacher over HTTP for what its ledger doesn't hold yet.

Whatever speaks the OpenAI chat protocol is a teacher. Every answer is in the ledger before it is
read, and what the ledger holds is never asked again.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

from distill_jax.config import TUTOR, TeacherConfig
from distill_jax.on_demand import OnDemand
from distill_jax.records import Completion
from distill_jax.teacher.account import Account, Ask
from distill_jax.teacher.asking import Asking, Desk
from distill_jax.teacher.batching import Batching
from distill_jax.teacher.clerk import Clerk, pour
from distill_jax.teacher.governor import PATIENCE, Governor, Patience
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.reply import Interrupted
from distill_jax.teacher.transport import connect

log = logging.getLogger(__name__)

Advance = Callable[[int, str], None]

_MISSING = Completion("", "error", 0)


class TeacherClient:
    """A teacher at an address; asks only for what its ledger doesn't hold.

    Args:
      config: Model, sampling, limits, price and budget.
      ledger: Where requests, answers and spending are kept.
      url: The base URL, such as `"https://api.openai.com/v1"`; for the tutor, where it listens.
      free: Whether the endpoint needs neither price nor key. If it has them they are used.
      patience: How long a prompt is tried.

    Raises:
      ValueError: the endpoint is not free and has no price, or is the tutor and has no Batch API.
      CredentialsRefused: the endpoint is not free and there is no key.
    """

    def __init__(
        self,
        config: TeacherConfig,
        ledger: Ledger,
        *,
        url: str,
        free: bool,
        patience: Patience = PATIENCE,
    ):
        if config.mode == "batch" and config.url == TUTOR:
            raise ValueError("the tutor has no Batch API: set teacher.mode=chat.")
        self._account = Account(config, ledger, url=url, free=free)
        self._config, self._ledger, self._patience = config, ledger, patience
        self._url, self._free = url, free

    def complete(
        self, asks: Sequence[Ask], *, advance: Advance = lambda *_: None
    ) -> list[tuple[Completion, ...]]:
        """Completes prompts, each as often as it has slots.

        Stops early on an interrupt (Ctrl-C, or a polite kill): the first lets what is in flight
        come home, the second stops at once.

        Args:
          asks: P prompts with their slots. Equal ones are asked once and share their answers.
          advance: Told how many more are done, and what has been spent.

        Returns:
          P tuples of completions, one per slot in order. An answer that never came is an empty
          completion with finish reason `error`.

        Raises:
          TeacherError: the budget, the quota, the key, the server or the user ended it; the class
            says which. Requests in flight have been awaited; their answers, like all before, are
            in the ledger, and the same call goes on from there.
          OSError: the disk is full. The same holds.
          ValueError: a prompt needs more tokens than `teacher.per_minute` lets through.
        """
        return list(self.fetch(asks, advance=advance))

    def fetch(
        self, asks: Sequence[Ask], *, advance: Advance = lambda *_: None
    ) -> Sequence[tuple[Completion, ...]]:
        """The same, but answers are read from the ledger when they are looked at, not held.

        Where the asks, too, are made when they are looked at, nothing large is held at all. The
        ledger must stay open.
        """
        pour(self._ledger)
        open_ = self._find_open(asks)
        todo = OnDemand(len(open_), lambda index: asks[open_[index]])
        spending = _Spending(self._ledger, len(todo))
        advance(len(asks) - len(todo), spending.told(0))
        if todo:
            self._check_rate(todo)
            try:
                asyncio.run(self._ask(todo, advance, spending))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None  # the second interrupt
        return self.recall(asks)

    def recall(self, asks: Sequence[Ask]) -> Sequence[tuple[Completion, ...]]:
        """What the ledger holds, as `fetch` returns it; asks nothing and costs nothing."""
        return OnDemand(len(asks), lambda index: self._recall(asks[index]))

    def _find_open(self, asks: Sequence[Ask]) -> Sequence[int]:
        """Which asks have to go out; of equal ones the first."""
        found, seen = array("q"), set()
        for index, ask in enumerate(asks):
            if not self._is_open(ask, self._recall(ask)):
                continue
            same = (bytes.fromhex(self._account.request(ask).key), ask.slots)
            if same not in seen:
                seen.add(same)
                found.append(index)
        return found

    def _recall(self, ask: Ask) -> tuple[Completion, ...]:
        answers = self._account.answers(self._ledger, self._account.request(ask))
        return tuple(answers.get(slot, _MISSING) for slot in ask.slots)

    def _is_open(self, ask: Ask, answers: Sequence[Completion]) -> bool:
        if _MISSING not in answers:
            return False
        request = self._account.request(ask)
        return not self._account.hopeless(self._ledger, request, self._patience)

    def _check_rate(self, asks: Sequence[Ask]) -> None:
        """Refuses what would wait for ever."""
        most = self._config.per_minute[1]
        for ask in asks if most else ():
            tokens = self._account.request(ask).likely_tokens(len(ask.slots))
            if tokens > most:
                raise ValueError(
                    f"a prompt with its {len(ask.slots)} answers may take {tokens} tokens, and "
                    f"teacher.per_minute lets {most} through; raise it, or lower "
                    "teacher.max_tokens or teacher.samples."
                )

    async def _ask(self, asks: Sequence[Ask], advance: Advance, spending: "_Spending") -> None:
        config, patience, account = self._config, self._patience, self._account
        with Clerk(self._ledger.path) as clerk:
            async with connect(self._url, account.secret, patience, local=self._free) as transport:
                desk = Desk(account, self._ledger, clerk, transport, patience)

                def finished() -> None:
                    advance(1, spending.told(1))

                batching = Batching(desk, finished, lambda detail: advance(0, detail))
                with _interruptible(batching):
                    await batching.collect()
                    if config.mode == "batch":
                        await batching.ask(asks)
                        return
                governor = Governor(
                    concurrency=config.concurrency, per_minute=config.per_minute, patience=patience
                )
                asking = Asking(desk, governor, finished)
                with _interruptible(asking):
                    await asking.ask(asks, workers=config.concurrency)


class _Spending:
    """What has been spent, and what this call will have been at its end."""

    def __init__(self, ledger: Ledger, num_asks: int):
        self._ledger, self._num_asks, self._done = ledger, num_asks, 0
        self._before = ledger.spent_usd

    def told(self, done: int) -> str:
        """A few words, once so many more prompts are done; nothing where nothing costs."""
        self._done += done
        spent = self._ledger.spent_usd
        if not spent:
            return ""
        if not self._done:
            return f"${spent:.2f} spent"
        end = self._before + (spent - self._before) * self._num_asks / self._done
        return f"${spent:.2f} of about ${end:.2f} spent"


@contextlib.contextmanager
def _interruptible(asking: Asking | Batching) -> Iterator[None]:
    """Lets a first interrupt stop the asking gently, and a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, which must look after them
        return
    loop, task, times = asyncio.get_running_loop(), asyncio.current_task(), 0
    assert task is not None

    def interrupt() -> None:
        nonlocal times
        times += 1
        if times > 1:
            task.cancel()
            return
        asking.stop(Interrupted("interrupted; the same command goes on from here."))
        log.warning(
            "stopping: %d requests are on their way; what they bring is kept. "
            "Interrupt again to stop at once.",
            asking.num_in_flight,
        )

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
