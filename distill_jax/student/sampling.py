"""Choosing tokens from logits: temperature, top-k and top-p without sorting, one number per token.

Letters: B rows, V vocabulary, W what is summed or drawn from, k of top-k.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

KEY_KIND = "threefry2x32"
"""Named, so that the numbers drawn do not follow JAX's default."""

BLOCK = 128
"""Tokens summed together before one of them is drawn; a long running sum is slow."""

PILE = 32
"""Tokens whose largest logit stands for them while the k largest of all are looked for."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
      temperature: Divides the logits; above 0.
      top_k: Only the k largest logits may be drawn; 0 keeps all. What ties with the k-th is kept
        too where k is not small beside the vocabulary.
      top_p: Of those, only the likeliest that together reach this probability; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def choose(
    scores: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    steps: Int[Array, " B"],
    greedy: Bool[Array, " B"] | None,
    sampling: Sampling,
) -> Int[Array, " B"]:
    """The likeliest token for greedy rows, a drawn one for each other row.

    Args:
      scores: Float32 logits; -inf is never chosen.
      keys: Key data of each row.
      steps: Each token's place in its completion, from 0.
      greedy: Which rows take the likeliest; None for all of them.
      sampling: How the others draw.
    """
    if greedy is None:
        return likeliest(scores)
    uniform = uniforms(keys, steps)
    if 0 < sampling.top_k * PILE * 4 <= scores.shape[-1]:
        best, tokens = largest(scores, sampling.top_k)
        place = jnp.where(greedy, 0, draw(best, uniform, sampling))
        return jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0]
    return jnp.where(greedy, likeliest(scores), draw(scores, uniform, sampling))


def likeliest(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest; XLA's argmax is ten times slower on CPUs."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    places = jnp.where(scores == top, jnp.arange(scores.shape[-1])[None], scores.shape[-1])
    return jnp.min(places, axis=-1)


def uniforms(keys: UInt32[Array, "B 2"], steps: Int[Array, " B"]) -> Float[Array, " B"]:
    """One number in [0, 1) for each row: a function of its key and of the token's place.

    Args:
      keys: Key data of each row.
      steps: Each token's place in its completion, from 0.
    """
    return jax.vmap(lambda key, step: jax.random.uniform(jax.random.fold_in(key, step)))(
        jax.random.wrap_key_data(keys, impl=KEY_KIND), steps
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


def largest(
    scores: Float[Array, "B V"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The `count` largest logits of each row, falling, and their tokens.

    They lie in the `count` piles of tokens with the largest tops, so that only the tops, and the
    tokens of those piles, are sorted.

    Example:
      >>> [array.tolist() for array in largest(jnp.array([[3.0, 1.0, 4.0, 1.0, 5.0]]), 2)]
      [[[5.0, 4.0]], [[4, 2]]]
    """
    rows, size = scores.shape
    piles = jnp.pad(scores, ((0, 0), (0, -size % PILE)), constant_values=-jnp.inf)
    piles = piles.reshape(rows, PILE, -1)  # tokens of a pile lie apart: whole lanes are compared
    _, chosen = jax.lax.top_k(jnp.max(piles, axis=1), min(count, piles.shape[2]))
    inside = jnp.take_along_axis(piles, chosen[:, None], axis=2)
    tokens = jnp.arange(PILE)[None, :, None] * piles.shape[2] + chosen[:, None]
    best, place = jax.lax.top_k(inside.reshape(rows, -1), count)
    return best, jnp.take_along_axis(tokens.reshape(rows, -1), place, axis=1)


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
