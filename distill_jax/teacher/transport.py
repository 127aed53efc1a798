"""The connection to a teacher: bytes out, bytes in, and no opinion on what they mean."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import openai

from distill_jax.teacher.governor import Patience
from distill_jax.teacher.secret import Secret

LARGEST_BODY = 16 << 20
"""Bytes of an answer after which no more is read, which leaves it unreadable."""

SAMPLES_HEADER = "X-Samples"
"""Says which samples of a prompt are wanted. The tutor, whose answers are a function of what it is
asked, says something else in each; other servers draw at random, and ignore it."""

_NO_KEY = "EMPTY"  # sent to servers that need none


@dataclass(frozen=True, slots=True)
class Raw:
    """The body of an answer with status 200, and what the server calls the request."""

    body: str
    request_id: str | None


class Transport:
    """Sends requests, each once.

    Args:
      client: Of the endpoint, without retries of its own.
      secret: The key, which a server may have echoed.
      patience: How long one request may take.
    """

    def __init__(self, client: openai.AsyncOpenAI, secret: Secret, patience: Patience):
        self.client = client
        self._secret, self._request_s = secret, patience.request_s

    async def send(self, body: Mapping[str, Any], *, samples: Sequence[int]) -> Raw:
        """Asks for some completions of a prompt, those of these indices.

        Raises:
          APIStatusError, APIConnectionError: as `openai` raises them.
          TimeoutError: the whole took too long. Unlike the connection's own limits, this one ends
            an answer that comes drop by drop.
        """
        several = len(samples) if len(samples) > 1 else openai.omit  # some servers don't know `n`
        create = partial(
            self.client.chat.completions.with_streaming_response.create,
            extra_headers={SAMPLES_HEADER: ",".join(map(str, samples))},
        )
        async with asyncio.timeout(self._request_s), create(**body, n=several) as response:
            chunks, size = [], 0
            try:
                async for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > LARGEST_BODY:
                        break
            except httpx2.TransportError as error:
                raise openai.APIConnectionError(request=response.http_request) from error
            text = b"".join(chunks).decode(errors="replace")
            return Raw(self._secret.hide(text), response.request_id)


@asynccontextmanager
async def connect(
    url: str, secret: Secret, patience: Patience, *, local: bool
) -> AsyncIterator[Transport]:
    """Opens connections to a base URL while the block runs.

    Args:
      url: Such as `"https://api.openai.com/v1"`.
      secret: The key; one that is read again is used from then on.
      patience: How long to wait for a connection, a byte and an answer.
      local: Whether the server is on this machine, which a proxy for the outside can't reach.
    """

    async def key() -> str:
        return secret.value or _NO_KEY

    timeout = openai.Timeout(patience.read_s, connect=patience.connect_s)
    async with openai.AsyncOpenAI(
        base_url=url,
        api_key=key,
        max_retries=0,  # there is one owner of retries, and it is `Asking`
        timeout=timeout,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=not local, timeout=timeout),
    ) as client:
        yield Transport(client, secret, patience)
