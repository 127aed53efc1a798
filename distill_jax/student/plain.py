"""A batch of an encoder-decoder, text by text, and the states of its decoder's tokens.

The encoder reads demonstrations and question together, and its states depend on all of them: they
are computed once per question, for all texts that answer it, but nothing is shared by questions.
The language-modelling loss weighs the decoder's tokens only, as nobody predicts the prompt.

Letters: M microbatches, S row shards of the mesh, B rows of a shard, L prompt tokens, J answers of
a row, R their tokens, T the decoder's tokens of a shard, C the first of them, N other tokens for
one of these, D width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.attention import Segment
from distill_jax.student.blocks import Remat
from distill_jax.student.model import Params, with_params
from distill_jax.student.tree import Batch, Counts


class PlainBatch(NamedTuple):
    """The rows of one step; made by `plain_packing.pack`.

    The decoder's tokens of a shard stand in one line, answer by answer: the answers that may
    predict something of all rows, then the others. Each answer has R + 1 places, as the decoder
    reads `start_id` before it; at its last token's place stands that token's state.
    """

    tokens: Int[Array, "M S B L"]
    mask: Bool[Array, "M S B L"]
    live: Int[Array, "M S K B R"]  # answers whose gradient reaches the prompt
    cut: Int[Array, "M S J B R"]  # and those whose gradient ends there
    targets: Int[Array, "M S C"]  # as in `tree.Batch`, like all that follows
    weights: Float[Array, "M S C"]
    owners: Int[Array, "M S C"]
    ends: Int[Array, "M S B 3"]
    valid: Bool[Array, "M S B"]
    counts: Counts
    others: Int[Array, "M S C N"] | None = None
    shares: Float[Array, "M S C N"] | None = None

    @property
    def computed(self) -> int:
        """Tokens of the encoder and of the decoder, padding and each `start_id` included."""
        answers = sum(x.size + math.prod(x.shape[:-1]) for x in (self.live, self.cut))
        return self.tokens.size + answers


AnyBatch = Batch | PlainBatch
"""A batch of whichever student."""


def plain_states(
    config: EncoderDecoderConfig,
    params: Params,
    batch: PlainBatch,
    *,
    dtype: DTypeLike,
    remat: Remat,
    constrain: Callable[[Array], Array],
) -> Float[Array, "S T D"]:
    """The states of all the decoder's tokens of a microbatch, whose arrays have no axis M.

    Args:
      config: What the student looks like.
      params: Its weights.
      batch: From `plain_packing.pack`, one microbatch of it.
      dtype, remat, constrain: As in `EncoderDecoder.encode`.
    """
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "constrain": constrain}
    model = with_params(config, params)
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
    memory = model.remember(model.encode(tokens, mask, **options), mask)
    read = partial(_read, config, model, options)
    states = [read(batch.live, memory)]
    if batch.cut.shape[1]:
        # As where a prompt's keys and values are cut off in a decoder.
        states.append(read(batch.cut, jax.lax.stop_gradient(memory)))
    return jnp.concatenate(states, axis=1)


def _read(
    config: EncoderDecoderConfig,
    model: Any,
    options: dict[str, Any],
    texts: Int[Array, "S J B R"],
    memory: Segment,
) -> Float[Array, "S T D"]:
    """The states of `start_id` and the tokens of every answer, in line."""
    shards, answers, rows, length = texts.shape
    by_row = texts.swapaxes(1, 2).reshape(-1, length)
    inputs = jnp.pad(by_row, ((0, 0), (1, 0)), constant_values=config.start_id)
    hidden, _ = model.decode(inputs, memory, **options)
    by_answer = hidden.reshape(shards, rows, answers, length + 1, -1).swapaxes(1, 2)
    return by_answer.reshape(shards, -1, hidden.shape[-1])
