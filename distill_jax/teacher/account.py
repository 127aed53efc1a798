"""What is asked of one endpoint, what it may cost, and what the ledger holds of it."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from distill_jax.config import TUTOR, TeacherConfig
from distill_jax.prompts import PROMPT_VERSION
from distill_jax.records import Completion
from distill_jax.teacher.ledger import Ledger, Stored, request_key
from distill_jax.teacher.reply import (
    BudgetReached,
    CredentialsRefused,
    Fault,
    QuotaExhausted,
    no_quota,
    read_reply,
)

log = logging.getLogger(__name__)

_SHORTEST_SECRET = 8  # a shorter key, such as `EMPTY`, is an ordinary word and hides nothing
_LONGEST_DETAIL = 500  # characters of what a server said that are shown
_CHAT_OVERHEAD = 64  # tokens that a chat template may add to a prompt


def endpoint(url: str) -> str:
    """The part of a base URL that says who answers: no credentials, no query.

    Example:
      >>> endpoint("https://me:secret@API.example.org/v1/?token=x")
      'https://api.example.org/v1'
    """
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, made ready.

    Attributes:
      identity: All that decides the answer; the ledger's key is made from it.
      key: That key.
      worst_prompt_tokens: More tokens than the prompt can have.
    """

    identity: Mapping[str, Any]
    key: str
    worst_prompt_tokens: int

    @property
    def body(self) -> Mapping[str, Any]:
        """What is sent, without the number of samples."""
        return self.identity["body"]


class Account:
    """One endpoint with its price, budget, key and ledger. Sends nothing.

    Args:
      config: Model, sampling, samples per prompt, price and budget.
      ledger: Where requests, answers and spending are kept.
      url: The base URL.
      free: Whether the endpoint needs neither price nor key. If it has them they are used.
      first_slot: Of the samples asked for. Other slots are other samples of the same prompt.

    Raises:
      ValueError: the endpoint is not free and has no price.
      CredentialsRefused: the endpoint is not free and the key's environment variable is not set.
    """

    def __init__(
        self, config: TeacherConfig, ledger: Ledger, *, url: str, free: bool, first_slot: int
    ):
        # the tutor gets another port at every start, and its answers don't depend on it
        is_tutor = config.url == TUTOR
        self.endpoint = TUTOR if is_tutor else endpoint(url)
        self.slots, self.ledger = range(first_slot, first_slot + config.samples), ledger
        if config.price_usd is None and not free:
            raise ValueError(f"the price of {self.endpoint} is unknown: set teacher.price_usd.")
        self._price = config.price_usd or (0.0, 0.0)
        self._limit = config.budget_usd if any(self._price) else None
        self.secret = "" if is_tutor else os.environ.get(config.api_key_env, "").strip()
        if not self.secret and not free:
            raise CredentialsRefused(
                f"the environment variable {config.api_key_env} is not set; "
                f"it holds the key for {self.endpoint}."
            )
        self._config = config
        self._served_models: set[str] = set()

    def request(self, prompt: str) -> Request:
        """The request that asks for completions of a prompt."""
        identity = {
            "endpoint": self.endpoint,
            "api": "chat.completions",
            "prompt_version": PROMPT_VERSION,
            "body": {
                "model": self._config.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": self._config.temperature,
                "top_p": self._config.top_p,
                "max_tokens": self._config.max_tokens,
            },
        }
        # a token stands for at least one byte
        return Request(identity, request_key(identity), len(prompt.encode()) + _CHAT_OVERHEAD)

    def reserve(self, request: Request, slots: Sequence[int]) -> int | None:
        """Opens an intent at the most the request can cost; None when that is not left."""
        worst = self._usd(request.worst_prompt_tokens, len(slots) * self._config.max_tokens)
        return self.ledger.reserve(request.identity, slots, usd=worst, limit_usd=self._limit)

    def over_budget(self) -> BudgetReached:
        """The error that says what is spent and what to do."""
        return BudgetReached(
            "the next request may cost more than is left of teacher.budget_usd: "
            f"{self.ledger.spent_usd:.4f} of {self._limit} US dollars are spent or reserved. "
            "Raise it and run the same command again: nothing is lost."
        )

    def answers(self, request: Request) -> dict[int, Completion]:
        """What the ledger holds for a prompt, by slot; books what a killed process left unread."""
        found: dict[int, Completion] = {}
        for stored in self.ledger.answers(request.key):
            if not stored.settled and self.settle(stored) is not None:
                continue
            reply = read_reply(stored.raw, max_tokens=self._config.max_tokens)
            for slot, completion in zip(stored.slots, reply.completions, strict=False):
                if completion is not None:  # a reply may hold fewer or more choices than asked for
                    found.setdefault(slot, completion)
        return found

    def missing(self, request: Request) -> list[int]:
        """The slots that have no answer yet."""
        found = self.answers(request)
        return [slot for slot in self.slots if slot not in found]

    def settle(self, stored: Stored) -> Fault | None:
        """Books a stored answer; one without any text becomes a failure.

        Raises:
          QuotaExhausted: that is what the answer says.
        """
        reply = read_reply(stored.raw, max_tokens=self._config.max_tokens)
        usd = None if reply.tokens is None else self._usd(*reply.tokens)
        if reply.problem:
            self.ledger.fail(stored.intent, "bad answer", reply.problem, usd=usd)
            detail = self.printable(reply.problem)
            if no_quota(reply.error_code):
                raise QuotaExhausted(f"the account at {self.endpoint} has no quota left: {detail}")
            return Fault("bad answer", detail, billed=True)
        self.ledger.settle(
            stored.intent,
            usd=usd,
            served_model=reply.served_model,
            usage=reply.usage,
            finish_reasons=reply.finish_reasons,
        )
        self._note_model(reply.served_model or self._config.model)
        return None

    def _note_model(self, served: str) -> None:
        """Warns once for each model that answers in place of the one that was asked."""
        if served != self._config.model and served not in self._served_models:
            self._served_models.add(served)
            asked, name = self._config.model, self.printable(served)
            log.warning("the teacher at %s: asked %s, %s answers.", self.endpoint, asked, name)

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt, completion = self._price
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6

    def redact(self, text: str) -> str:
        """Text without the key, for all that is kept."""
        long_enough = len(self.secret) >= _SHORTEST_SECRET
        return text.replace(self.secret, "[key]") if long_enough else text

    def printable(self, text: str) -> str:
        """Text for people: without the key, of bounded length, without control characters."""
        shown = self.redact(text)[:_LONGEST_DETAIL]
        return "".join(char if char.isprintable() else " " for char in shown)
