"""What the student is trained to make small: pure functions of arrays.

Letters: B rows, L tokens, D width, V vocabulary, S row shards, T token states of a shard, K other
tokens that might stand in a token's place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK, LOGITS = 512, 2**24
"""Token states of a shard whose logits live at the same time: so many, and more where the
vocabulary is small, up to so many logits, as every chunk adds to the whole gradient of the head."""


Logits = Callable[[Any, Float[Array, "*rows D"]], Float[Array, "*rows V"]]
"""Maps the weights of the head, and states, to float32 logits."""


class SoftTargets(NamedTuple):
    """Targets that share their places with other tokens; shares of 0 leave a target hard."""

    tokens: Int[Array, "S T"]  # each has what the others leave of 1
    others: Int[Array, "S T K"]
    shares: Float[Array, "S T K"]


Targets = Int[Array, "S T"] | SoftTargets


def prediction_costs(
    hidden: Float[Array, "S T D"],
    targets: Targets,
    head: Any,
    logits: Logits,
    *,
    chunk: int = 0,
) -> Float[Array, "S T"]:
    """`-log p(target)` of every token state, in float32; of soft ones the cross-entropy.

    Logits are made, used and forgotten a chunk at a time, in the backward pass too, so that no
    array of T by V values is ever alive.

    Args:
      hidden: States after the final norm; the rows of axis S are cut up alike.
      targets: The token that each state has to predict, or several with their shares.
      head: The weights that `logits` reads.
      logits: What scores states.
      chunk: States of a row per chunk; 0: as `chunk_size` says.
    """
    cost = jax.checkpoint(lambda part: _costs(logits, head, *part))
    costs = jax.lax.map(cost, _cut((hidden, targets), chunk or _fit(logits, head, hidden)))
    return costs.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]]


def prediction_loss(
    hidden: Float[Array, "S T D"],
    targets: Targets,
    head: Any,
    logits: Logits,
    weights: Float[Array, "S T"],
    *,
    chunk: int = 0,
) -> Float[Array, ""]:
    """`sum(weights * prediction_costs)`, which costs three products with the head, not four.

    As the weights are known, a chunk's gradient is made while its logits are alive, in the forward
    pass; the backward pass only scales it.

    Args:
      hidden, targets, head, logits, chunk: As in `prediction_costs`.
      weights: Of every prediction; they get no gradient.

    Source:
      Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024), section 3.2.
    """
    chunk = chunk or _fit(logits, head, hidden)
    return _loss(logits, head, *_cut((hidden, targets, weights), chunk))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(logits: Logits, head: Any, hidden: Array, targets: Any, weights: Array) -> Array:
    def loss(part: tuple[Array, Any, Array]) -> Array:
        return jnp.sum(part[2] * _costs(logits, head, *part[:2]))

    return jnp.sum(jax.lax.map(loss, (hidden, targets, weights)))


def _loss_forward(
    logits: Logits, head: Any, hidden: Array, targets: Any, weights: Array
) -> tuple[Array, tuple[Any, Array]]:
    def add(total: tuple[Array, Any], part: tuple[Array, Any, Array]):
        def loss(head: Any, hidden: Array) -> Array:
            return jnp.sum(part[2] * _costs(logits, head, hidden, part[1]))

        value, (to_head, to_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(head, part[0])
        return jax.tree.map(jnp.add, total, (value, to_head)), to_hidden

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, head))
    (loss, to_head), to_hidden = jax.lax.scan(add, zero, (hidden, targets, weights))
    return loss, (to_head, to_hidden)


def _loss_backward(
    logits: Logits, gradients: tuple[Any, Array], grad: Array
) -> tuple[Any, Array, None, None]:
    to_head, to_hidden = jax.tree.map(lambda x: x * grad.astype(x.dtype), gradients)
    return to_head, to_hidden, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _costs(logits: Logits, head: Any, hidden: Array, targets: Any) -> Array:
    scores = logits(head, hidden)
    tokens = targets.tokens if isinstance(targets, SoftTargets) else targets
    found = jnp.take_along_axis(scores, tokens[..., None], axis=-1)
    if isinstance(targets, SoftTargets):
        others = jnp.take_along_axis(scores, targets.others, axis=-1)
        found += jnp.sum(targets.shares * (others - found), axis=-1, keepdims=True)
    return jax.nn.logsumexp(scores, axis=-1) - found[..., 0]


def chunk_size(vocab: int) -> int:
    """Token states of a shard per chunk, for a vocabulary.

    Example:
      >>> chunk_size(16_384), chunk_size(50_304)
      (1024, 512)
    """
    return max(CHUNK, LOGITS // vocab)


def _fit(logits: Logits, head: Any, hidden: Array) -> int:
    return chunk_size(jax.eval_shape(logits, head, hidden).shape[-1])


def _cut(arrays: Any, chunk: int) -> Any:
    """Each [S, T, ...] to [chunks, S, at most `chunk`, ...], padded with zeros."""

    def cut(array: Array) -> Array:
        shards, length = array.shape[:2]
        num_chunks = -(-length // chunk)
        size = -(-length // num_chunks)
        padding = [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        return padded.reshape(shards, num_chunks, size, *array.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def last_state(hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """The state at each row's last real token, which stands for the whole text.

    Rows are padded on the right. A row without real tokens gives the state at position 0, which
    the caller has to mask out.
    """
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def cosine_distance(x: Float[Array, "B D"], y: Float[Array, "B D"]) -> Float[Array, " B"]:
    """`1 - cos(x, y)` per row, in [0, 2]. A norm below 1e-8 counts as 1e-8."""

    def unit(z: Array) -> Array:
        square = jnp.sum(z * z, axis=-1, keepdims=True)
        return z * jax.lax.rsqrt(jnp.maximum(square, 1e-16))

    return 1.0 - jnp.sum(unit(x) * unit(y), axis=-1)


def triplet_costs(
    anchor: Float[Array, "B D"],
    positive: Float[Array, "B D"],
    negative: Float[Array, "B D"],
    valid: Bool[Array, " B"],
    *,
    margin: float,
) -> Float[Array, " B"]:
    """Each row's `max(0, d(anchor, positive) - d(anchor, negative) + margin)`, 0 where not valid.

    Args and source: as `triplet_loss`.
    """
    if not 0.0 < margin <= 2.0:
        raise ValueError(f"margin is a cosine distance in (0, 2]; got {margin}.")
    anchor, positive, negative = (x.astype(jnp.float32) for x in (anchor, positive, negative))
    gap = cosine_distance(anchor, positive) - cosine_distance(anchor, negative)
    return jnp.where(valid, jnp.maximum(gap + margin, 0.0), 0.0)


def triplet_loss(
    anchor: Float[Array, "B D"],
    positive: Float[Array, "B D"],
    negative: Float[Array, "B D"],
    valid: Bool[Array, " B"],
    *,
    margin: float,
) -> Float[Array, ""]:
    """Pulls each rationale towards another right one and away from a wrong one.

    With d the cosine distance, a valid row costs

        max(0, d(anchor, positive) - d(anchor, negative) + margin)

    and the loss is the mean over valid rows. A row is invalid when its question has no second
    right rationale or no recorded mistake: such rows weigh nothing in the sum or in the count,
    and a batch with none of them costs exactly zero.

    Args:
      anchor: The student's last-token state of the rationale being trained on.
      positive: The same, for a different right rationale to the same question.
      negative: The same, for the student's own wrong rationale to that question.
      valid: True where the row has both a positive and a negative.
      margin: How much nearer the positive must be than the negative before the row costs
        nothing; in cosine distance, so it lies in (0, 2].

    Returns:
      A float32 scalar in [0, margin + 2], whatever the dtype of the states.

    Raises:
      ValueError: `margin` is outside (0, 2]. Raised while tracing.

    Source:
      Wang et al., "Democratizing Reasoning Ability" (EMNLP 2023), self-reflection learning. The
      authors' code measures distance as minus the cosine; the ones cancel inside the hinge.

    Example:
      >>> right = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> wrong = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> both = jnp.array([True, True])
      >>> float(triplet_loss(right, right, wrong, both, margin=0.5))
      0.25
      >>> float(triplet_loss(right, right, wrong, ~both, margin=0.5))
      0.0
    """
    costs = triplet_costs(anchor, positive, negative, valid, margin=margin)
    return jnp.sum(costs) / jnp.maximum(jnp.sum(valid), 1)


def ranking_costs(
    anchor: Float[Array, "*rows"],
    negative: Float[Array, "*rows"],
    valid: Bool[Array, "*rows"],
    *,
    margin: float,
) -> Float[Array, "*rows"]:
    """Each row's `max(0, margin - anchor + negative)`, 0 where not valid.

    Args:
      anchor: Mean `log p` of a token of the rationale that is trained on, in nats.
      negative: The same for the student's own wrong rationale.
      valid: True where the row has both.
      margin: How much likelier a token of the anchor must be before the row costs nothing.

    Source:
      Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback" (2023), with
      the likelihood per token instead of per text, as lengths of rationales differ.

    Example:
      >>> both = jnp.array([True, False])
      >>> costs = ranking_costs(jnp.full(2, -1.0), jnp.full(2, -1.5), both, margin=1.0)
      >>> costs.tolist()
      [0.5, 0.0]
    """
    return jnp.where(valid, jnp.maximum(margin - anchor + negative, 0.0), 0.0)


def dpo_costs(
    anchor: Float[Array, "*rows"],
    negative: Float[Array, "*rows"],
    valid: Bool[Array, "*rows"],
    *,
    beta: float,
) -> Float[Array, "*rows"]:
    """Each row's `-log sigmoid(beta * (anchor - negative))`, 0 where not valid.

    The language-modelling loss on the anchor stands beside it, as Pang et al. found needed.

    Args:
      anchor: `log p` of the rationale that is trained on, minus what it was under the reference.
      negative: The same for the student's own wrong rationale.
      valid: True where the row has both.
      beta: How much a log ratio counts.

    Source:
      Rafailov et al., "Direct Preference Optimization" (NeurIPS 2023), equation 7; Pang et al.,
      "Iterative Reasoning Preference Optimization" (NeurIPS 2024).

    Example:
      >>> both = jnp.array([True, False])
      >>> costs = dpo_costs(jnp.ones(2), jnp.ones(2), both, beta=0.1)
      >>> [round(cost, 4) for cost in costs.tolist()]
      [0.6931, 0.0]
    """
    return jnp.where(valid, -jax.nn.log_sigmoid(beta * (anchor - negative)), 0.0)
