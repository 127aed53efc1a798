"""What the student is trained to make small: pure functions of arrays.

Letters: B rows, L tokens, D width, V vocabulary, T token states in a flat list.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 512
"""Token states whose logits live at the same time."""


def lm_loss_sum(
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    logits: Callable[[Float[Array, "C D"]], Float[Array, "C V"]],
    *,
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """The weighted sum of `-log p(target)` over token states.

    Logits are made, used and forgotten a chunk at a time, in the backward pass too, so that no
    array of T by V values is ever alive.

    Args:
      hidden: States after the final norm.
      targets: The token that each state has to predict; any id where the weight is 0.
      weights: Weight of each prediction; 0 leaves it out.
      logits: Maps C states to C rows of float32 logits.
      chunk: States per chunk, at least 1.

    Returns:
      A float32 scalar, not divided by anything: the caller knows what to divide by.
    """
    size = min(chunk, max(hidden.shape[0], 1))
    rest = -hidden.shape[0] % size

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, rest)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, size, *array.shape[1:])

    @jax.checkpoint
    def chunk_sum(states: Array, wanted: Array, weight: Array) -> Array:
        scores = logits(states)
        found = jnp.take_along_axis(scores, wanted[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * (jax.nn.logsumexp(scores, axis=-1) - found))

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + chunk_sum(*part), None

    parts = (cut(hidden), cut(targets), cut(weights.astype(jnp.float32)))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


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
