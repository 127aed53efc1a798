"""Drawing tokens from logits: temperature, top-k and top-p without sorting, one number per token.

Letters: B rows, V vocabulary, W what is summed or drawn from.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

KEY_KIND = "threefry2x32"
"""Named, so that the numbers drawn do not follow JAX's default."""

BLOCK = 128
"""Tokens summed together before one of them is drawn; a long running sum is slow."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
      temperature: Divides the logits; above 0.
      top_k: Only the k largest logits may be drawn, and what ties with the k-th; 0 keeps all.
      top_p: Of those, only the likeliest that together reach this probability; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniforms(keys: UInt32[Array, "B 2"], step: Int[Array, ""]) -> Float[Array, " B"]:
    """One number in [0, 1) for each row: a function of its key and of the token's place.

    Args:
      keys: Key data of each row.
      step: The token's place in its completion, from 0.
    """
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(
        jax.random.wrap_key_data(keys, impl=KEY_KIND)
    )


def draw(
    scores: Float[Array, "B V"], uniform: Float[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Draws a token from each row of logits.

    Args:
      scores: Float32 logits; -inf is never drawn.
      uniform: One number in [0, 1) for each row: the only randomness there is.
      sampling: How.

    Example:
      >>> scores = jnp.log(jnp.array([[0.5, 0.2, 0.3]]))
      >>> [int(draw(scores, jnp.array([u]), Sampling())[0]) for u in (0.1, 0.6, 0.9)]
      [0, 1, 2]
      >>> [int(draw(scores, jnp.array([u]), Sampling(top_k=2))[0]) for u in (0.1, 0.6, 0.9)]
      [0, 0, 2]
    """
    return _pick_blocked(weigh(scores, sampling), uniform)


def weigh(scores: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Each token's chance, up to a factor per row; 0 for what may not be drawn.

    Temperature, then top-k, then top-p on what is left, each with all ties of its last token. No
    sorting: the cut is found by bisection over the 32 bits of the logits.
    """
    scores = scores / sampling.temperature
    order = _ordered(scores)
    if 0 < sampling.top_k < scores.shape[-1]:
        count = jnp.full(scores.shape[:1], float(sampling.top_k))
        scores = jnp.where(_best(order, jnp.ones_like(scores), count), scores, -jnp.inf)
    chance = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    if sampling.top_p < 1.0:
        mass = sampling.top_p * jnp.sum(chance, axis=-1)
        chance = jnp.where(_best(order, chance, mass), chance, 0.0)
    return chance


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats; both zeros give the same one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _best(
    order: UInt32[Array, "B V"], weight: Float[Array, "B V"], enough: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """The first tokens in falling order that together weigh `enough`, with ties of the last."""

    def set_bit(i: Array, cut: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= higher[:, None], weight, 0.0), axis=-1)
        return jnp.where(mass >= enough, higher, cut)

    return order >= jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(order[:, 0]))[:, None]


def _pick_blocked(chance: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """`_pick` in two steps: a block of tokens, then one of them."""
    padded = jnp.pad(chance, ((0, 0), (0, -chance.shape[1] % BLOCK)))
    blocks = padded.reshape(chance.shape[0], -1, BLOCK)
    block, rest = _pick(jnp.sum(blocks, axis=-1), uniform)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _pick(inside, rest)[0]


def _pick(
    chance: Float[Array, "B W"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The index drawn, and how far into it `uniform` fell, in [0, 1).

    A running sum in floating point need not rise where the chance is 0, nor stand still: an index
    of chance 0 counts as never reached, so it can't be drawn.
    """
    reached = jnp.where(chance > 0, jnp.cumsum(chance, axis=-1), 0.0)
    point = uniform * jnp.max(reached, axis=-1)
    index = jnp.argmax(reached > point[:, None], axis=-1)[:, None]
    width = jnp.take_along_axis(chance, index, axis=-1)[:, 0]
    end = jnp.take_along_axis(reached, index, axis=-1)[:, 0]
    below_one = 1.0 - jnp.finfo(jnp.float32).eps
    return index[:, 0], jnp.clip((point - (end - width)) / width, 0.0, below_one)
