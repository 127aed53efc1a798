"""What came back from a server: answers, a fault that is worth another try, or the end.

Reads bodies and errors, and has no effects: what has been read once reads the same again.
"""

import email.utils
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import openai

from distill_jax.records import Completion, FinishReason, Piece

FaultKind = Literal[
    "rate limit",
    "server error",
    "connection",
    "timeout",
    "bad answer",
    "refused prompt",
    "not asked",  # its batch was over before
]

_CUT = {"length", "max_tokens"}
_FILTERED = {"content_filter"}
_NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached"}
_STATUS_OF = {  # what an error inside a body that came with status 200 would have come with
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "overloaded_error": 529,
    "overloaded": 529,
    "server_error": 500,
    "internal_server_error": 500,
    "api_error": 500,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "model_not_found": 404,
}
_THIS_PROMPT_ONLY = {"context_length_exceeded", "content_filter", "content_policy_violation"}
_REASONING = ("reasoning_content", "reasoning")
_DIGITS = 6  # of a probability that are kept
_WORKED_ON = {502, 504, 520, 522, 524}  # a gateway gave up: the work may be done all the same
_NEVER_REACHED = {"ConnectError", "ConnectTimeout", "PoolTimeout"}  # of the HTTP library below
_SECONDS_PER_YEAR = 365 * 24 * 3600


class TeacherError(RuntimeError):
    """The teacher can't go on. What was paid for is in the ledger: the call can be repeated."""

    exit_code = 1


class RequestRefused(TeacherError):
    """The server refuses what is asked, and would refuse it for every prompt: wrong settings."""

    exit_code = 2


class BudgetReached(TeacherError):
    """The next request could cost more than is left. It was not sent."""

    exit_code = 10


class QuotaExhausted(TeacherError):
    """The account has no money or no quota left."""

    exit_code = 11


class CredentialsRefused(TeacherError):
    """The key is missing, wrong or revoked."""

    exit_code = 12


class TeacherUnavailable(TeacherError):
    """The server can't be reached, keeps failing, or asks for a longer wait than we allow."""

    exit_code = 14


class Interrupted(TeacherError):
    """Somebody asked to stop; what was in flight has been awaited."""

    exit_code = 14


@dataclass(frozen=True, slots=True)
class Fault:
    """What a request brought instead of an answer, where the run goes on.

    Attributes:
      kind: Which sort; all but `refused prompt` may go away by themselves.
      detail: What was seen, for people.
      billed: Whether it may have been billed: it reached the server and its end is unknown.
      retry_after_s: Seconds that the server asked to wait, or None.
    """

    kind: FaultKind
    detail: str
    billed: bool
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A body that came with status 200, read.

    Attributes:
      completions: One per choice, in order; None where the choice holds no text.
      problem: Why there is no usable choice at all, or `""`.
      error: The error inside the body, or None.
      served_model: The model that answered, as it calls itself.
      usage: The usage as sent.
      tokens: Prompt and completion tokens of the whole reply as they are charged, or None if it
        doesn't say.
      finish_reasons: As sent, one per choice.
    """

    completions: tuple[Completion | None, ...] = ()
    problem: str = ""
    error: Any = None
    served_model: str | None = None
    usage: Mapping[str, Any] | None = None
    tokens: tuple[int, int] | None = None
    finish_reasons: tuple[str | None, ...] = ()


def read_reply(raw: str, *, max_tokens: int) -> Reply:
    """Reads a body that came with status 200, which may be anything at all.

    The completion tokens, known only in sum, are spread evenly over the choices; where they are
    unknown a choice counts its bytes, at most `max_tokens`. When all choices together have as many
    tokens as were allowed, each was cut, whatever the server says. A choice that refuses counts as
    filtered: asking again would pay again.

    Example:
      >>> body = '{"choices": [{"message": {"content": "Four."}, "finish_reason": "stop"}]}'
      >>> read_reply(body, max_tokens=100).completions
      (Completion(text='Four.', finish_reason='stop', num_tokens=5, pieces=()),)
      >>> read_reply("<html>Bad gateway</html>", max_tokens=100).problem
      'the body is not a JSON object: <html>Bad gateway</html>'
    """
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return Reply(problem=f"the body is not a JSON object: {raw}")
    error, choices, usage = body.get("error"), body.get("choices"), body.get("usage")
    choices = choices if isinstance(choices, list) else []
    model = body.get("model")
    usage = usage if isinstance(usage, dict) else None
    tokens = _tokens(usage or {})
    each = None if tokens is None or not choices else tokens[1] // len(choices)
    full = tokens is not None and 0 < max_tokens * len(choices) <= tokens[1]
    completions = tuple(_completion(choice, each, max_tokens, full=full) for choice in choices)
    problem = "" if any(completions) else f"no choice holds a text: {raw}"
    return Reply(
        completions=completions,
        problem=f"an error with status 200: {raw}" if error else problem,
        error=error,
        served_model=_without_lone_surrogates(model) if isinstance(model, str) else None,
        usage=usage,
        tokens=_charged(usage or {}),
        finish_reasons=tuple(_finish(choice) for choice in choices),
    )


def _completion(
    choice: Any, num_tokens: int | None, max_tokens: int, *, full: bool
) -> Completion | None:
    message = choice.get("message") if isinstance(choice, dict) else None
    message = message if isinstance(message, dict) else {}
    content = message.get("content")
    text = _without_lone_surrogates(content) if isinstance(content, str) else ""
    sent = _finish(choice)
    reason: FinishReason = "length" if sent in _CUT or full else "stop"
    if sent in _FILTERED or (not text.strip() and message.get("refusal")):
        reason = "content_filter"
    if not text.strip() and reason == "stop":
        return None  # a cut or filtered answer may be empty, and asking again would pay again
    if num_tokens is None:
        num_tokens = min(max_tokens, len(text.encode()))
    return Completion(text, reason, num_tokens, read_pieces(choice))


def _without_lone_surrogates(text: str) -> str:
    """Text that a tokenizer and a database take: JSON may hold what UTF-8 has no room for."""
    return text.encode(errors="replace").decode()


def read_pieces(choice: Any) -> tuple[Piece, ...]:
    """What a choice says its text was put together from; () if it says nothing that can be read.

    Tokens that hold a part of a character are joined to one piece, of which nothing is known.

    Example:
      >>> other = {"token": " five", "logprob": -2.302585}
      >>> said = {"token": " 5", "logprob": -0.105361, "bytes": [32, 53], "top_logprobs": [other]}
      >>> read_pieces({"logprobs": {"content": [said]}})
      ((' 5', ((' 5', 0.9), (' five', 0.1))),)
    """
    try:
        return tuple(_join_bytes(choice["logprobs"]["content"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()


def _join_bytes(tokens: list[dict[str, Any]]) -> Iterator[Piece]:
    before = b""
    for token in tokens:
        said = before + _bytes(token)
        try:
            text = said.decode()
        except UnicodeDecodeError:
            before = said
            continue
        yield text, () if before else tuple(_chances(text, token))
        before = b""


def _chances(text: str, token: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A token and what might have stood in its place, each with its probability."""
    yield text, _probability(token)
    for other in token.get("top_logprobs") or ():
        said = _bytes(other).decode(errors="replace")
        if said != text:
            yield said, _probability(other)


def _bytes(token: dict[str, Any]) -> bytes:
    """The bytes of a token: as sent, or else those of its text."""
    sent = token.get("bytes")
    return token["token"].encode() if sent is None else bytes(list(sent))


def _probability(token: dict[str, Any]) -> float:
    share = math.exp(min(token["logprob"], 0.0))
    return round(share, _DIGITS) if share > 0.0 else 0.0  # what is not a number is no chance


def read_reasoning(raw: str) -> list[str]:
    """The reasoning that some servers send beside the text, one per choice that has any.

    Example:
      >>> read_reasoning('{"choices": [{"message": {"content": "4", "reasoning": "2 + 2"}}]}')
      ['2 + 2']
    """
    try:
        choices = json.loads(raw)["choices"]
        messages = [choice["message"] for choice in choices]
    except (ValueError, KeyError, TypeError):
        return []
    found = (m.get(name) for m in messages if isinstance(m, dict) for name in _REASONING)
    return [text for text in found if isinstance(text, str) and text]


def _finish(choice: Any) -> str | None:
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    return reason if isinstance(reason, str) else None


def _tokens(usage: Mapping[str, Any]) -> tuple[int, int] | None:
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int) and isinstance(completion, int) and min(prompt, completion) >= 0:
        return prompt, completion
    return None


def _charged(usage: Mapping[str, Any]) -> tuple[int, int] | None:
    """The same, with what some count in the total alone, such as reasoning, as completion."""
    tokens, total = _tokens(usage), usage.get("total_tokens")
    if tokens is None or not isinstance(total, int):
        return tokens
    prompt, completion = tokens
    return prompt, max(completion, total - prompt)


def _code(error: Any) -> str:
    """The machine-readable part of an error object: its code, or else its type."""
    if not isinstance(error, dict):
        return ""
    return str(error.get("code") or error.get("type") or "")


def diagnose(
    error: openai.APIConnectionError | openai.APIStatusError | TimeoutError,
) -> Fault | TeacherError:
    """What a failed request means: another try, or the end of the run.

    What never reached the provider counts as surely not billed, and so does what it refuses or
    fails itself. What got lost behind a gateway, on the way or in time may have been billed.
    """
    if isinstance(error, openai.APIStatusError):
        return diagnose_status(error.status_code, error.body, error.response.headers, error.message)
    cause = type(error.__cause__).__name__
    billed = cause not in _NEVER_REACHED
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("timeout", "no complete answer in time", billed)
    return Fault("connection", f"{cause}: {error.__cause__}", billed)


def diagnose_reply(reply: Reply) -> Fault | TeacherError | None:
    """The same for a body that came with status 200; None if it holds an answer.

    An error in it is taken at its word, but it may have been billed.
    """
    if not reply.problem:
        return None
    code = _code(reply.error)
    status = int(code) if code.isdecimal() else _STATUS_OF.get(code, 0)
    if status or code in _NO_QUOTA | _THIS_PROMPT_ONLY:
        end = diagnose_status(status, reply.error, {}, reply.problem)
        return replace(end, billed=True) if isinstance(end, Fault) else end
    return Fault("bad answer", reply.problem, billed=True)


def diagnose_status(
    status: int, error: Any, headers: Mapping[str, str], message: str
) -> Fault | TeacherError:
    """What an HTTP status means, with the error object that came along."""
    code, detail = _code(error), f"HTTP {status}: {message}"
    if status == 402 or code in _NO_QUOTA:
        return QuotaExhausted(f"the account has no quota left. {detail}")
    if status in (401, 403):
        return CredentialsRefused(f"the key was refused. {detail}")
    if status == 413 or code in _THIS_PROMPT_ONLY:
        return Fault("refused prompt", detail, billed=False)
    if status in (408, 409, 429) or status >= 500:
        wait = retry_after(headers, now=time.time())
        kind = "rate limit" if status == 429 else "server error"
        return Fault(kind, detail, billed=status in _WORKED_ON, retry_after_s=wait)
    return RequestRefused(f"the request was refused; see teacher.* in the config. {detail}")


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """The seconds that a server asks to wait, or None when it doesn't say or says nonsense.

    Args:
      headers: Of the answer, with lower-case names or a mapping that ignores case.
      now: Seconds since 1970, used for a date if the answer doesn't name its own.

    Example:
      >>> retry_after({"retry-after": "1.5"}, now=0.0), retry_after({"retry-after": "-3"}, now=0.0)
      (1.5, None)
      >>> retry_after({"retry-after-ms": "250"}, now=0.0)
      0.25
    """
    if "retry-after-ms" in headers:
        seconds = _number(headers["retry-after-ms"]) / 1000.0
    elif "retry-after" in headers:
        seconds = _number(headers["retry-after"])
        if math.isnan(seconds):
            # a date is read against the server's own clock, which may differ from ours
            seconds = _date(headers["retry-after"]) - _date(headers.get("date", ""), default=now)
    else:
        return None
    return seconds if 0.0 <= seconds <= _SECONDS_PER_YEAR else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _date(text: str, default: float = math.nan) -> float:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return default
