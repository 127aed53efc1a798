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

    keys: Float[Array, "G T K H"]
    values: Float[Array, "G T K H"]
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

    The scores of a stretch stay in its own layout [G, K, S, L, R, T], where all queries of a group
    and key head are one matrix product. Only what has no T (maxima, sums, mixed values) is brought
    to [B, L, K, R]. A token that sees nothing gets zeros.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = stretches[0].keys.shape[2]
    query = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    query = query * head_dim**-0.5

    def by_row(x: Array) -> Array:  # [G, K, S, L, R] -> [B, L, K, R]
        return jnp.moveaxis(x, 1, 3).reshape(query.shape[:4])

    def by_group(x: Array, groups: int) -> Array:  # and back
        return jnp.moveaxis(x.reshape(groups, -1, *x.shape[1:]), 3, 1)

    scores = []
    for keys, _, visible in stretches:
        grouped = query.reshape(keys.shape[0], -1, *query.shape[1:])
        products = jnp.einsum(
            "gslkrh,gtkh->gkslrt", grouped, keys, preferred_element_type=jnp.float32
        )
        scores.append(jnp.where(visible[:, None, None, :, None], products, -jnp.inf))
    tops = functools.reduce(jnp.maximum, (by_row(score.max(axis=-1)) for score in scores))
    # Any constant gives the same softmax; the largest score of all stretches keeps it in range.
    tops = jax.lax.stop_gradient(jnp.maximum(tops, jnp.finfo(jnp.float32).min))
    total, mixed = jnp.zeros(tops.shape), jnp.zeros(query.shape)
    for score, (_, values, _) in zip(scores, stretches, strict=True):
        weights = jnp.exp(score - by_group(tops, values.shape[0])[..., None])
        total += by_row(weights.sum(axis=-1))
        mixed += jnp.einsum(
            "gkslrt,gtkh->gslkrh",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        ).reshape(query.shape)
    mixed /= jnp.where(total > 0, total, 1.0)[..., None]
    return mixed.astype(query.dtype).reshape(rows, length, heads, head_dim)
