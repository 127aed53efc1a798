"""Attention as arrays: rotary turns, and one softmax over stretches that are kept apart.

Letters: B rows, L tokens of a row, G groups of a stretch, S rows of a group, T tokens of a stretch,
K key and value heads, R query heads per key head, H head dim.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from distill_jax.student.architecture import RopeScaling


class Stretch(NamedTuple):
    """What one layer sees of a segment, or of the rows' own tokens.

    Attributes:
      keys: With their positions applied.
      values: As projected.
      visible: For each row what each of its tokens sees. Where all rows of a group see the same it
        has G rows, and where all tokens of a row do, L is 1.
    """

    keys: Float[Array, "G K T H"]
    values: Float[Array, "G K T H"]
    visible: Bool[Array, "rows L T"]


Turns = tuple[Float32[Array, "B L half"], Float32[Array, "B L half"]]


def make_turns(
    positions: Int[Array, "B L"], *, dims: int, theta: float, scaling: RopeScaling | None
) -> Turns:
    """Cosine and sine of every position's angles, slow dims last."""
    rates = theta ** -(jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    if scaling is not None:
        rates *= _stretch(rates, scaling)
    angles = positions[..., None].astype(jnp.float32) * rates[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _stretch(rates: Float32[Array, " half"], scaling: RopeScaling) -> Float32[Array, " half"]:
    """What each rate is multiplied by to make its wavelength longer."""
    if scaling.bands is None:
        return jnp.full_like(rates, 1 / scaling.factor)
    low, high, length = scaling.bands
    turns = length * rates / (2 * jnp.pi)  # within the texts of the first training
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept + (1 - kept) / scaling.factor


def rotate(x: Float[Array, "B L n H"], by: Turns, *, interleaved: bool) -> Float[Array, "B L n H"]:
    """Turns each pair of dims by the angle of its position, in float32.

    Angles for fewer dims than a head has leave its last dims as they are. A pair is dims i and
    i + half of those turned, or neighbours where they are `interleaved`.
    """
    cos, sin = (turn[:, :, None] for turn in by)
    turned, kept = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    pairs = (*turned.shape[:-1], -1, 2) if interleaved else (*turned.shape[:-1], 2, -1)
    axis = -1 if interleaved else -2
    wide = turned.astype(jnp.float32).reshape(pairs)
    first, second = jnp.unstack(wide, axis=axis)
    both = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=axis)
    return jnp.concatenate([both.reshape(turned.shape).astype(x.dtype), kept], axis=-1)


def attend(
    query: Float[Array, "B L heads H"],
    stretches: Sequence[Stretch],
    *,
    scale: float,
    cap: float | None,
) -> Float[Array, "B L heads H"]:
    """One softmax over all stretches, which are never laid side by side.

    All queries of a group and key head are one matrix, [G K, S L R, H], so that each stretch costs
    plain batched products: written as one contraction over six dims, XLA's CPU backend is several
    times slower. Only what has no T (maxima, sums, mixed values) is brought together, as
    [B, L, K, R, ...]. A token that sees nothing gets zeros.

    Args:
      query: With their positions applied.
      stretches: What is attended to.
      scale: Scores are multiplied by it.
      cap: Then they are bent into plus or minus this; None leaves them.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = stretches[0].keys.shape[1]
    shape = (rows, length, kv_heads, heads // kv_heads)
    query = (query * scale).reshape(*shape, head_dim)
    groups = [stretch.keys.shape[0] for stretch in stretches]
    scores = [_score(query, *parts, cap) for parts in zip(stretches, groups, strict=True)]
    tops = functools.reduce(
        jnp.maximum,
        (_by_row(x.max(axis=-1), g, shape) for x, g in zip(scores, groups, strict=True)),
    )
    # Any constant gives the same softmax; the largest score of all stretches keeps it in range.
    tops = jax.lax.stop_gradient(jnp.maximum(tops, jnp.finfo(jnp.float32).min))
    total, mixed = jnp.zeros(shape), jnp.zeros(query.shape)
    for score, stretch, g in zip(scores, stretches, groups, strict=True):
        weights = jnp.exp(score - _by_group(tops, g)[..., None])
        total += _by_row(weights.sum(axis=-1), g, shape)
        values = _by_head(stretch.values)
        mixed += _by_row(_product("xmt,xth->xmh", weights.astype(values.dtype), values), g, shape)
    mixed /= jnp.where(total > 0, total, 1.0)[..., None]
    return mixed.astype(query.dtype).reshape(rows, length, heads, head_dim)


def _score(
    query: Float[Array, "B L K R H"], stretch: Stretch, groups: int, cap: float | None
) -> Array:
    """Scores of one stretch, [G K, S L R, T]; -inf where a query does not see a token."""
    rows, length, kv_heads, repeats, _ = query.shape
    scores = _product("xmh,xth->xmt", _by_group(query, groups), _by_head(stretch.keys))
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    apart = scores.reshape(groups, kv_heads, rows // groups, length, repeats, scores.shape[-1])
    visible = stretch.visible.reshape(groups, -1, *stretch.visible.shape[1:])
    return jnp.where(visible[:, None, :, :, None], apart, -jnp.inf).reshape(scores.shape)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_group(x: Array, groups: int) -> Array:
    """[B, L, K, R, ...] to [G K, S L R, ...]."""
    x = jnp.moveaxis(x.reshape(groups, -1, *x.shape[1:]), 3, 1)
    return x.reshape(groups * x.shape[1], -1, *x.shape[5:])


def _by_row(x: Array, groups: int, shape: tuple[int, int, int, int]) -> Array:
    """[G K, S L R, ...] back to [B, L, K, R, ...], which is `shape`."""
    _, length, kv_heads, repeats = shape
    x = x.reshape(groups, kv_heads, -1, length, repeats, *x.shape[2:])
    return jnp.moveaxis(x, 1, 3).reshape(*shape, *x.shape[5:])


def _by_head(x: Float[Array, "G K T H"]) -> Float[Array, "GK T H"]:
    return x.reshape(-1, *x.shape[2:])
