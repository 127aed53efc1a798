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


class Stretch(NamedTuple):
    """What one layer sees of a segment, or of the rows' own tokens."""

    keys: Float[Array, "G K T H"]
    values: Float[Array, "G K T H"]
    visible: Bool[Array, "G L T"]  # L is 1 where all tokens of a group see the same


Turns = tuple[Float32[Array, "B L half"], Float32[Array, "B L half"]]


def make_turns(positions: Int[Array, "B L"], *, head_dim: int, theta: float) -> Turns:
    """Cosine and sine of every position's angles, slow dims last."""
    dims = jnp.arange(0, head_dim, 2, dtype=jnp.float32)
    rates = theta ** -(dims / head_dim)
    angles = positions[..., None].astype(jnp.float32) * rates[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L n H"], by: Turns | None) -> Float[Array, "B L n H"]:
    """Turns each pair (dim i, dim i + H/2) by the angle of its position, in float32."""
    if by is None:
        return x
    cos, sin = (turn[:, :, None] for turn in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B L heads H"], stretches: Sequence[Stretch]
) -> Float[Array, "B L heads H"]:
    """One softmax over all stretches, which are never laid side by side.

    All queries of a group and key head are one matrix, [G K, S L R, H], so that each stretch costs
    plain batched products: written as one contraction over six dims, XLA's CPU backend is several
    times slower. Only what has no T (maxima, sums, mixed values) is brought together, as
    [B, L, K, R, ...]. A token that sees nothing gets zeros.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = stretches[0].keys.shape[1]
    shape = (rows, length, kv_heads, heads // kv_heads)
    query = (query * head_dim**-0.5).reshape(*shape, head_dim)
    groups = [stretch.keys.shape[0] for stretch in stretches]
    scores = [_score(query, *parts) for parts in zip(stretches, groups, strict=True)]
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


def _score(query: Float[Array, "B L K R H"], stretch: Stretch, groups: int) -> Array:
    """Scores of one stretch, [G K, S L R, T]; -inf where a query does not see a token."""
    rows, length, kv_heads, repeats, _ = query.shape
    scores = _product("xmh,xth->xmt", _by_group(query, groups), _by_head(stretch.keys))
    apart = scores.reshape(groups, kv_heads, rows // groups, length, repeats, scores.shape[-1])
    visible = stretch.visible[:, None, None, :, None]
    return jnp.where(visible, apart, -jnp.inf).reshape(scores.shape)


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
