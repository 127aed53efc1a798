"""What a server understands of the chat protocol, learned from what it refuses.

Some know the token limit by another name, some let nobody choose a temperature, some give one
answer at a time. Each is found out once per model and remembered in the ledger.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_jax.config import TeacherConfig

_OPTIONAL = ("temperature", "top_p")  # may be left to the server, which is then said aloud
_LIKELIHOODS = ("top_logprobs", "logprobs")  # one is no use without the other
_NOT_KNOWN = re.compile(  # as opposed to a value that is out of range
    r"(?i)un(?:supported|recogni[sz]ed|known|expected)"
    r"|not (?:be )?(?:supported|permitted|allowed|enabled)"
    r"|(?:n't|not) support|extra|only the default|deprecated"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model at one endpoint is asked.

    Attributes:
      limit_name: What the token limit is called.
      unsent: What it refuses and isn't sent: settings left to it, or the wish for `logprobs`.
      one_by_one: Whether several samples take several requests.
    """

    limit_name: str = "max_tokens"
    unsent: tuple[str, ...] = ()
    one_by_one: bool = False

    def body(
        self, config: TeacherConfig, prompt: str, *, max_tokens: int, alternatives: int = 0
    ) -> dict[str, Any]:
        """The body of a request, without the number of samples.

        Args:
          config: Model and sampling.
          prompt: What is asked.
          max_tokens: Of an answer.
          alternatives: How many likely tokens it is to name for each one it says, at most 20; 0
            asks for no probabilities.

        Example:
          >>> new = Dialect(limit_name="max_completion_tokens", unsent=("temperature", "top_p"))
          >>> new.body(TeacherConfig(model="m"), "2 + 3?", max_tokens=99)["max_completion_tokens"]
          99
        """
        likelihoods = {"logprobs": True, "top_logprobs": alternatives}
        plain = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": config.temperature,
            "top_p": config.top_p,
            **(likelihoods if alternatives else {}),
            "max_tokens": max_tokens,
        }
        return self.translate(plain)

    def translate(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """A body in the words of `Dialect()`, in the words of this one.

        Example:
          >>> new = Dialect("max_completion_tokens", unsent=("top_p",))
          >>> new.translate({"top_p": 0.9, "max_tokens": 99})
          {'max_completion_tokens': 99}
        """
        unsent = {*self.unsent, *(_LIKELIHOODS if "logprobs" in self.unsent else ())}
        names = {"max_tokens": self.limit_name}
        return {names.get(name, name): plain[name] for name in plain if name not in unsent}

    def to_json(self) -> str:
        """As text, for the ledger."""
        return json.dumps([self.limit_name, self.unsent, self.one_by_one])

    @classmethod
    def from_json(cls, text: str) -> "Dialect":
        """What `to_json` wrote."""
        limit_name, unsent, one_by_one = json.loads(text)
        return cls(limit_name, tuple(unsent), one_by_one)

    def learn(self, sent: Mapping[str, Any], *, num_samples: int, error: Any) -> "Dialect | None":
        """A dialect without what a server has refused; None if that can't be told or helped.

        Each part can be given up once, so this ends.

        Args:
          sent: The body that was refused.
          num_samples: How many answers it asked for.
          error: What came back with status 400, 403 or 422, in whatever form.

        Example:
          >>> refusal = {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens"}
          >>> sent = {"max_tokens": 9, "temperature": 1.0}
          >>> Dialect().learn(sent, num_samples=1, error=refusal).limit_name
          'max_completion_tokens'
          >>> Dialect().learn(sent, num_samples=1, error={"message": "no such model"}) is None
          True
        """
        names = ("max_tokens", *_OPTIONAL, *_LIKELIHOODS)
        candidates = [name for name in names if name in sent]
        if num_samples > 1:
            candidates.append("n")
        name = _blamed(error, candidates)
        if name == "max_tokens":
            return replace(self, limit_name="max_completion_tokens")
        if name == "n":
            return replace(self, one_by_one=True)
        if name in _LIKELIHOODS:
            return replace(self, unsent=(*self.unsent, "logprobs"))
        return replace(self, unsent=(*self.unsent, name)) if name else None


def _blamed(error: Any, candidates: Sequence[str]) -> str:
    """The sent parameter that an error is about, or `""`.

    A field that names it wins. In a text a single letter must stand in quotes.
    """
    text = json.dumps(error, ensure_ascii=False, default=str)
    if not _NOT_KNOWN.search(text):
        return ""
    named = error.get("param") if isinstance(error, Mapping) else None
    if named in candidates:
        return str(named)
    for name in candidates:
        quoted = rf"['\"`]{name}\\?['\"`]"
        if re.search(quoted if len(name) == 1 else rf"(?i)(?<!\w){name}(?!\w)", text):
            return name
    return ""
