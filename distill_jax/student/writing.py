"""Questions to answers by an encoder-decoder: read once, then one token of every answer at a time.

Letters: Q questions, L their tokens, S answers of a question, B all answers, T tokens of an answer,
V padded vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.encoder_decoder import Cache
from distill_jax.student.model import Params, logits, with_params
from distill_jax.student.sampling import Sampling, choose


class Questions(NamedTuple):
    """What is to be answered. A question that only fills the batch has limits of 0."""

    tokens: Int[Array, "Q L"]
    mask: Bool[Array, "Q L"]
    limits: Int[Array, "Q S"]  # tokens of an answer at most
    keys: UInt32[Array, "Q S 2"]  # an answer's randomness, a function of its identity alone


class Written(NamedTuple):
    """Answers as token ids. The token that ended one is its last."""

    tokens: Int[Array, "Q S T"]
    count: Int[Array, "Q S"]
    stopped: Bool[Array, "Q S"]  # by the end token, not by the limit


class _State(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, " B"]  # the last one chosen, not fed yet
    cache: Cache
    tokens: Int[Array, "B T"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]


def write(
    config: EncoderDecoderConfig,
    params: Params,
    questions: Questions,
    *,
    longest: int,
    end_id: int,
    num_tokens: int,
    sampling: Sampling,
    dtype: DTypeLike,
) -> Written:
    """Answers every question of a batch: the first answer greedily, the others at random.

    The encoder's states, and what the decoder attends to of them, are computed once per question
    for all its answers, which have a cache of their own tokens only.

    Args:
      config: What the student looks like.
      params: Its weights.
      questions: The batch.
      longest: T, no less than any limit.
      end_id: Ends an answer; -1 for none.
      num_tokens: Ids below this mean something; no other is chosen.
      sampling: How tokens are drawn.
      dtype: Of products and cache; logits and probabilities are float32.
    """
    model = with_params(config, params)
    states = model.encode(questions.tokens, questions.mask, dtype=dtype)
    memory = model.remember(states, questions.mask)
    shape, limits = questions.limits.shape, questions.limits.ravel()
    keys, greedy = questions.keys.reshape(-1, 2), jnp.arange(limits.size) % shape[1] == 0

    def going(state: _State) -> Bool[Array, " B"]:
        return ~state.stopped & (state.count < limits)

    def go_on(state: _State) -> _State:
        hidden, cache = model.decode(
            state.token[:, None], memory, state.cache, state.step, dtype=dtype
        )
        scores = logits(config, params, hidden[:, 0])
        known = jnp.arange(scores.shape[-1]) < num_tokens
        token = _choose(jnp.where(known[None], scores, -jnp.inf), state, keys, greedy, sampling)
        now = going(state)
        written = jnp.where(now, token, 0)[:, None]
        return _State(
            state.step + 1,
            token,
            cache,
            jax.lax.dynamic_update_slice(state.tokens, written, (0, state.step)),
            state.count + now,
            state.stopped | (now & (token == end_id)),
        )

    none = jnp.zeros(limits.shape, jnp.int32)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        token=none + config.start_id,
        cache=model.make_cache(limits.size, longest, dtype=dtype),
        tokens=jnp.zeros((limits.size, longest), jnp.int32),
        count=none,
        stopped=jnp.zeros(limits.shape, bool),
    )
    state = jax.lax.while_loop(lambda state: jnp.any(going(state)), go_on, state)
    written = Written(state.tokens, state.count, state.stopped)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), written)


def _choose(
    scores: Float[Array, "B V"],
    state: _State,
    keys: UInt32[Array, "B 2"],
    greedy: Bool[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    return choose(scores, keys, state.count, greedy, sampling)
