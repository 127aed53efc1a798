"""What is asked of one endpoint, what it may cost, and what the ledger holds of it."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from distill_jax.config import TUTOR, TeacherConfig
from distill_jax.prompts import PROMPT_VERSION
from distill_jax.records import Completion
from distill_jax.teacher.dialect import Dialect
from distill_jax.teacher.governor import Patience
from distill_jax.teacher.ledger import Ledger, Stored, request_key
from distill_jax.teacher.reply import (
    BudgetReached,
    CredentialsRefused,
    Fault,
    Reply,
    TeacherError,
    read_reply,
)
from distill_jax.teacher.secret import Secret

log = logging.getLogger(__name__)

_LONGEST_DETAIL = 500  # characters of what a server said that are shown
_CHAT_OVERHEAD = 64  # tokens that a chat template may add to a prompt
_BYTES_PER_TOKEN = 3  # few, so that the guess is high; the worst case is 1
_OF_A_PROMPT = (  # failures that it may cause; a server that is busy or a key says nothing of it
    *("server error", "connection", "timeout", "bad answer", "refused prompt"),
    "missing from its batch",
)
_PROCESSES = 3  # how often the attempts of `Patience` are granted to a prompt in all


def endpoint(url: str) -> str:
    """The part of a base URL that says who answers: no credentials, no query.

    Example:
      >>> endpoint("https://me:secret@API.example.org/v1/?token=x")
      'https://api.example.org/v1'
    """
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"


def find_secret(config: TeacherConfig, *, free: bool) -> Secret:
    """The key of a teacher; an empty one where none is needed.

    Raises:
      CredentialsRefused: there is none and one is needed, or it can't be read.
    """
    secret = Secret("" if config.url == TUTOR else config.api_key_env)
    if not secret.value and not free:
        name = config.api_key_env
        raise CredentialsRefused(
            f"the environment variable {name} is not set; it holds the key for "
            f"{endpoint(config.url)}. {name}_FILE may name a file that does."
        )
    return secret


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted: completions of a prompt.

    Attributes:
      prompt: The text, of one question.
      slots: Which samples of it. A slot is asked once; another one is another sample.
      longer: Whether they may have twice the usual number of tokens: those asked before were cut.
      alternatives: How many likely tokens the teacher is to name for each one it says, at most 20;
        0 asks for no probabilities. It may refuse.
    """

    prompt: str
    slots: tuple[int, ...]
    longer: bool = False
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt made ready to be sent.

    Attributes:
      identity: All that decides the answer, with the body as `Dialect()` has it: what is learned
        of a server in the course of a run must not hide the answers that came before.
      key: Of the ledger, made from `identity`.
      body: What is sent, without the number of samples.
      slots: The samples that are wanted.
      max_tokens: Of each.
      prompt_bytes: UTF-8 bytes of the prompt; a token stands for at least one.
    """

    identity: Mapping[str, Any]
    key: str
    body: Mapping[str, Any]
    slots: tuple[int, ...]
    max_tokens: int
    prompt_bytes: int

    @property
    def keys(self) -> list[str]:
        """Where answers may stand: ledgers of old have them under a key made from what was sent."""
        if self.body == self.identity["body"]:
            return [self.key]
        return [self.key, request_key({**self.identity, "body": self.body})]

    def likely_tokens(self, num_samples: int) -> int:
        """Tokens of prompt and answers together, guessed high."""
        prompt = self.prompt_bytes // _BYTES_PER_TOKEN + _CHAT_OVERHEAD
        return prompt + num_samples * self.max_tokens


class Account:
    """One endpoint with its price, budget, key and dialect. Sends nothing.

    Args:
      config: Model, sampling, price and budget.
      ledger: What is remembered of the endpoint.
      url: The base URL.
      free: Whether the endpoint needs neither price nor key. If it has them they are used.

    Raises:
      ValueError: the endpoint is not free and has no price.
      CredentialsRefused: the endpoint is not free and there is no key.
    """

    def __init__(self, config: TeacherConfig, ledger: Ledger, *, url: str, free: bool):
        # the tutor gets another port at every start, and its answers don't depend on it
        self.is_tutor = config.url == TUTOR
        self.endpoint = TUTOR if self.is_tutor else endpoint(url)
        if config.price_usd is None and not free:
            raise ValueError(f"the price of {self.endpoint} is unknown: set teacher.price_usd.")
        self._price = config.price_usd or (0.0, 0.0)
        self._limit = config.budget_usd if any(self._price) else None
        self.secret = find_secret(config, free=free)
        known = ledger.dialect(self.endpoint, config.model)
        self.dialect = Dialect() if known is None else Dialect.from_json(known)
        self._config = config
        self._served_models: set[str] = set()

    @property
    def draws_samples(self) -> bool:
        """Whether two samples of a prompt should differ."""
        return self._config.temperature > 0.0

    def request(self, ask: Ask) -> Request:
        """The request that asks for completions of a prompt, in the dialect known so far."""
        config = self._config
        max_tokens = config.max_tokens * (2 if ask.longer else 1)
        plain = Dialect().body(
            config, ask.prompt, max_tokens=max_tokens, alternatives=ask.alternatives
        )
        identity = {
            "endpoint": self.endpoint,
            "api": "chat.completions",
            "prompt_version": PROMPT_VERSION,
            "body": plain,
        }
        key, size = request_key(identity), len(ask.prompt.encode())
        body = self.dialect.translate(plain)
        return Request(identity, key, body, ask.slots, max_tokens, size)

    def learn(
        self, ledger: Ledger, sent: Mapping[str, Any], *, num_samples: int, error: Any
    ) -> bool:
        """Draws what can be learned from the refusal of a body; says whether to ask again."""
        if self.speaks_otherwise(sent, num_samples=num_samples):
            return True  # somebody else has been refused the same
        learned = self.dialect.learn(sent, num_samples=num_samples, error=error)
        if learned is None:
            return False
        self.speak(ledger, learned)
        log.warning(
            "%s at %s is asked another way: %s.", self._config.model, self.endpoint, learned
        )
        return True

    def speaks_otherwise(self, sent: Mapping[str, Any], *, num_samples: int) -> bool:
        """Whether a body that was sent would be another one now."""
        wanted = sent.get("top_logprobs", 0)
        now = self.dialect.body(self._config, "", max_tokens=1, alternatives=wanted)
        return set(sent) - {"n"} != set(now) or (num_samples > 1 and self.dialect.one_by_one)

    def speak(self, ledger: Ledger, dialect: Dialect) -> None:
        """Uses a dialect from now on, in later runs of the same ledger too."""
        ledger.learned(self.endpoint, self._config.model, dialect.to_json())
        self.dialect = dialect

    def reserve(
        self, ledger: Ledger, request: Request, slots: Sequence[int], *, batch: int | None = None
    ) -> int | None:
        """Opens an intent at the most the request can cost; None when that is not left."""
        prompt_tokens = request.prompt_bytes + _CHAT_OVERHEAD
        worst = self._usd(prompt_tokens, len(slots) * request.max_tokens)
        return ledger.reserve(
            request.identity, slots, usd=worst, limit_usd=self._limit, batch=batch
        )

    def fail(self, ledger: Ledger, intent: int, end: Fault | TeacherError) -> None:
        """Books a request that brought no answer."""
        if isinstance(end, Fault):
            usd, final = None if end.billed else 0.0, end.kind == "refused prompt"
            ledger.fail(intent, end.kind, self.secret.hide_all(end.detail), usd=usd, final=final)
        else:
            ledger.fail(intent, type(end).__name__, self.secret.hide_all(str(end)), usd=0.0)

    def told(self, error: TeacherError) -> TeacherError:
        """The same error in words that may be shown."""
        return type(error)(self.printable(str(error)))

    def over_budget(self, ledger: Ledger) -> BudgetReached:
        """The error that says what is spent and what to do."""
        return BudgetReached(
            "the next request may cost more than is left of teacher.budget_usd: "
            f"{ledger.spent_usd:.4f} of {self._limit} US dollars are spent or reserved. "
            "Raise it and run the same command again: nothing is lost."
        )

    def answers(self, ledger: Ledger, request: Request) -> dict[int, Completion]:
        """What the ledger holds for a request, by slot; books what a killed process left unread."""
        found: dict[int, Completion] = {}
        for stored in itertools.chain.from_iterable(map(ledger.answers, request.keys)):
            if not stored.settled:
                reply = self.settle(ledger, stored, max_tokens=request.max_tokens)
                if reply.problem:
                    continue
            reply = read_reply(stored.raw, max_tokens=request.max_tokens)
            for slot, completion in zip(stored.slots, reply.completions, strict=False):
                if completion is not None:  # a reply may hold fewer or more choices than asked for
                    found.setdefault(slot, completion)
        return found

    def missing(self, ledger: Ledger, request: Request) -> list[int]:
        """The slots that have no answer yet."""
        found = self.answers(ledger, request)
        return [slot for slot in request.slots if slot not in found]

    def hopeless(self, ledger: Ledger, request: Request, patience: Patience) -> bool:
        """Whether a request has failed in a way, or so often, that it is not asked again."""
        number, final = ledger.num_failures(request.key, _OF_A_PROMPT)
        return final or number >= _PROCESSES * patience.attempts

    def settle(self, ledger: Ledger, stored: Stored, *, max_tokens: int) -> Reply:
        """Reads a stored answer and books it; one without any text becomes a failure."""
        reply = read_reply(stored.raw, max_tokens=max_tokens)
        usd = None if reply.tokens is None else self._usd(*reply.tokens)
        if reply.problem:
            detail = self.secret.hide_all(reply.problem)
            ledger.fail(stored.intent, "bad answer", detail, usd=usd)
            return reply
        ledger.settle(
            stored.intent,
            usd=usd,
            served_model=reply.served_model,
            usage=reply.usage,
            finish_reasons=reply.finish_reasons,
        )
        self._note_model(reply.served_model or self._config.model)
        return reply

    def _note_model(self, served: str) -> None:
        """Warns once for each model that answers in place of the one that was asked."""
        if served != self._config.model and served not in self._served_models:
            self._served_models.add(served)
            asked, name = self._config.model, self.printable(served)
            log.warning("the teacher at %s: asked %s, %s answers.", self.endpoint, asked, name)

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt, completion = self._price
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6

    def printable(self, text: str) -> str:
        """Text for people: without keys, of bounded length, without control characters."""
        shown = self.secret.hide_all(text)[:_LONGEST_DETAIL]
        return "".join(char if char.isprintable() else " " for char in shown)
