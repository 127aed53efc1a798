"""A batch as a tree of tokens, and its two losses.

A training sample is demonstrations, question and rationale, and the triplet loss adds two more
rationales behind the same question. The batch is that tree: the demonstrations once, each question
once, then three branches. In a causal model a shared stretch has one value, so loss and gradient
equal those of the flat sequences (dropout must be 0, and is).

Letters: B rows, K branches of a row, P shared tokens, Q question tokens, R branch tokens, L tokens
of a stretch, D width, T token states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill_jax.student.losses import last_state, lm_loss_sum, triplet_costs
from distill_jax.student.model import ModelConfig, Params, Segment, logits


class Stretch(NamedTuple):
    """One stretch of tokens per row, padded on the right."""

    tokens: Int[Array, "B L"]
    mask: Bool[Array, "B L"]


class Batch(NamedTuple):
    """The rows of one step, as a tree.

    `positive` and `negative` have no columns when there is no triplet loss, and rows without a
    pair hold no real tokens there.
    """

    shared: Int[Array, " P"]  # demonstrations: what every prompt begins with; may be empty
    question: Stretch  # the rest of the prompt, at least one token
    anchor: Stretch  # the rationale trained on, with its answer and end token
    positive: Stretch  # another right rationale
    negative: Stretch  # the student's own wrong one
    valid: Bool[Array, " B"]  # has a positive and a negative
    real: Bool[Array, " B"]  # False for rows that only fill the batch; they weigh nothing


@dataclass(frozen=True)
class Objective:
    """What the step makes small: `lm + reflection_weight * reflection`.

    Attributes:
      prompt_weight: Weight of a prompt token in the language-modelling loss; the target's is 1.
      reflection: `triplet`, or `none`.
      reflection_weight: Weight of the reflection loss.
      margin: Of the triplet loss, a cosine distance.
      prefix_gradient: Whether the reflection loss's gradient reaches the prompt's states. The
        value is the same either way; the original code cuts it, the paper's equation does not.
    """

    prompt_weight: float = 0.1
    reflection: Literal["triplet", "none"] = "triplet"
    reflection_weight: float = 0.5
    margin: float = 1.0
    prefix_gradient: bool = False


class Losses(NamedTuple):
    """Sums over rows; `Counts` holds what to divide them by."""

    lm: Float[Array, ""]
    reflection: Float[Array, ""]


class Counts(NamedTuple):
    """What a batch holds, known before any state is computed."""

    predicted: Float[Array, ""]  # tokens of all flat sequences but the first of each: unweighted
    valid: Float[Array, ""]
    real: Float[Array, ""]
    useful: Float[Array, ""]  # real tokens of the tree


def count(batch: Batch) -> Counts:
    """What `batch` holds."""
    real = batch.real[:, None]
    question, anchor = batch.question.mask & real, batch.anchor.mask & real
    num_real = jnp.sum(batch.real)
    prompts = num_real * batch.shared.shape[0] + jnp.sum(question)
    pairs = jnp.sum(batch.positive.mask) + jnp.sum(batch.negative.mask)
    useful = batch.shared.shape[0] + jnp.sum(question) + jnp.sum(anchor) + pairs
    parts = (prompts + jnp.sum(anchor) - num_real, jnp.sum(batch.valid), num_real, useful)
    return Counts(*(part.astype(jnp.float32) for part in parts))


def computed_tokens(batch: Batch) -> int:
    """Tokens that the step computes for `batch`'s shapes, padding included."""
    branches = (batch.question, batch.anchor, batch.positive, batch.negative)
    return batch.shared.size + sum(stretch.tokens.size for stretch in branches)


def losses(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    objective: Objective,
    *,
    forward: Callable[..., tuple[Array, Segment]],
) -> Losses:
    """Both losses of a batch, as sums over its rows.

    The language-modelling loss weighs `-log p` of every token of demonstrations, question and
    rationale but the very first: `prompt_weight` in the prompt, 1 in the target. The shared
    demonstrations have one value in all rows and are counted once per real row.

    Args:
      config: What the student looks like.
      params: Its weights.
      batch: M rows.
      objective: Weights and margin.
      forward: `student.model.forward` with precision and layout bound.

    Source:
      Wang et al. (EMNLP 2023), equations 3 to 5, with the released code's weights.
    """
    shared_state, past = _shared(params, batch, forward)
    length = batch.shared.shape[0]
    rows, width = batch.question.tokens.shape
    places = jnp.broadcast_to(length + jnp.arange(width), (rows, width))
    question_states, segment = forward(
        params, batch.question.tokens, places, batch.question.mask, past
    )
    past = (*past, segment)
    end = length + jnp.sum(batch.question.mask, axis=1)

    if objective.reflection == "none":
        anchor_states, _ = _branches(params, (batch.anchor,), end, past, forward)
        reflection = jnp.zeros((), jnp.float32)
    else:
        triple = (batch.anchor, batch.positive, batch.negative)
        if objective.prefix_gradient:
            states, masks = _branches(params, triple, end, past, forward)
            anchor_states = states[:, :1]
        else:
            anchor_states, _ = _branches(params, (batch.anchor,), end, past, forward)
            states, masks = _branches(params, triple, end, jax.lax.stop_gradient(past), forward)
        anchor, positive, negative = (last_state(states[:, i], masks[:, i]) for i in range(3))
        valid = batch.valid & batch.real
        costs = triplet_costs(anchor, positive, negative, valid, margin=objective.margin)
        reflection = jnp.sum(costs)

    flat = _predictions(
        batch, objective.prompt_weight, shared_state, question_states, anchor_states[:, 0]
    )
    return Losses(lm_loss_sum(*flat, partial(logits, config, params)), reflection)


def _shared(
    params: Params, batch: Batch, forward: Callable[..., tuple[Array, Segment]]
) -> tuple[Float[Array, "P D"] | None, tuple[Segment, ...]]:
    """The demonstrations' states, and what later stretches attend to; nothing if there are none."""
    length = batch.shared.shape[0]
    if not length:
        return None, ()
    mask = jnp.ones((1, length), bool)
    states, segment = forward(params, batch.shared[None], jnp.arange(length)[None], mask, ())
    return states[0], (segment,)


def _branches(
    params: Params,
    branches: tuple[Stretch, ...],
    start: Int[Array, " B"],
    past: tuple[Segment, ...],
    forward: Callable[..., tuple[Array, Segment]],
) -> tuple[Float[Array, "B K R D"], Bool[Array, "B K R"]]:
    """K branches of every row in one pass; each row's positions begin at its `start`."""
    longest = max(branch.tokens.shape[1] for branch in branches)

    def stack(arrays: list[Array]) -> Array:
        padded = [jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in arrays]
        return jnp.stack(padded, axis=1)

    tokens, masks = (stack(list(parts)) for parts in zip(*branches, strict=True))
    rows, kinds, _ = tokens.shape
    places = jnp.repeat(start, kinds)[:, None] + jnp.arange(longest)[None]
    flat = (rows * kinds, longest)
    states, _ = forward(params, tokens.reshape(flat), places, masks.reshape(flat), past)
    return states.reshape(rows, kinds, longest, -1), masks


def _predictions(
    batch: Batch,
    prompt_weight: float,
    shared_state: Float[Array, "P D"] | None,
    question_states: Float[Array, "B Q D"],
    anchor_states: Float[Array, "B R D"],
) -> tuple[Float[Array, "T D"], Int[Array, " T"], Float[Array, " T"]]:
    """Every state that predicts a token, that token, and the prediction's weight."""
    question, anchor = batch.question, batch.anchor
    real = batch.real.astype(jnp.float32)
    rows = jnp.arange(real.shape[0])
    last = jnp.maximum(jnp.sum(question.mask, axis=1) - 1, 0)

    after = jnp.pad(question.tokens[:, 1:], ((0, 0), (0, 1)))
    after = after.at[rows, last].set(anchor.tokens[:, 0])
    weight = prompt_weight * jnp.pad(question.mask[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    weight = weight.at[rows, last].set(1.0)  # the first token of the target

    states = [question_states, anchor_states[:, :-1]]
    targets = [after, anchor.tokens[:, 1:]]
    weights = [weight * real[:, None], anchor.mask[:, 1:] * real[:, None]]
    if shared_state is not None:  # its last state predicts each row's own first question token
        final = jnp.broadcast_to(shared_state[-1:], (real.shape[0], shared_state.shape[1]))
        states += [shared_state[:-1], final]
        targets += [batch.shared[1:], question.tokens[:, 0]]
        once = jnp.broadcast_to(prompt_weight * jnp.sum(real), (batch.shared.shape[0] - 1,))
        weights += [once, prompt_weight * real]
    width = question_states.shape[-1]
    return (
        jnp.concatenate([x.reshape(-1, width) for x in states]),
        jnp.concatenate([x.reshape(-1) for x in targets]),
        jnp.concatenate([x.reshape(-1) for x in weights]),
    )
