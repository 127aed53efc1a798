"""Attention as arrays: rotary turns, and one softmax over stretches that are kept apart.

Letters: N layers, B rows, L tokens of a row, G groups of a stretch, S rows of a group, T tokens of
a stretch, K key and value heads, R query heads per key head, H head dim, M groups that a row asks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from distill_jax.student.architecture import RopeScaling

LOWEST = float(jnp.finfo(jnp.float32).min)


class Route(NamedTuple):
    """Which rows ask which groups, where that is not told by their order.

    Only what rows ask and what they get is moved, never a key or a value.
    """

    rows: Int[Array, "G S"]  # the row that asks at each place of a group; any row where none does
    places: Int[Array, "B M"]  # where each row asks, as group * S + place; G * S for nowhere


class Turned(NamedTuple):
    """Keys whose dims lie before the tokens: what few queries at a time are multiplied with."""

    keys: Float[Array, "*stack H T"]


class Segment(NamedTuple):
    """Context that later tokens attend to: one stretch of tokens of every group.

    Attributes:
      keys: With their positions applied.
      values: As projected.
      positions: Of the tokens in their texts.
      mask: True where a real token stands.
      route: Which rows attend to which groups, where their order does not tell.
    """

    keys: Float[Array, "N G K T H"] | Turned
    values: Float[Array, "N G K T H"]
    positions: Int[Array, "G T"]
    mask: Bool[Array, "G T"]
    route: Route | None = None


class Stretch(NamedTuple):
    """What one layer sees of a segment, or of the rows' own tokens.

    Attributes:
      keys: With their positions applied.
      values: As projected.
      visible: For each row what each of its tokens sees. Where all rows of a group see the same it
        has G rows, and where all tokens of a row do, L is 1.
      route: Which rows ask which groups; if None, row b asks group b // (B // G). With a route, the
        rows of `visible` are G groups or their G S places.
      bias: Added to the scores of all rows of a group; g is G, or 1 where groups don't differ.
    """

    keys: Float[Array, "G K T H"] | Turned
    values: Float[Array, "G K T H"]
    visible: Bool[Array, "rows L T"]
    route: Route | None = None
    bias: Float32[Array, "g heads L T"] | None = None


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


class Share(NamedTuple):
    """What one stretch adds to a softmax over several: sums over its tokens, relative to `top`."""

    top: Float32[Array, "B L K R"]
    total: Float32[Array, "B L K R"]
    mixed: Float32[Array, "B L K R H"]


def attend(
    query: Float[Array, "B L heads H"],
    stretches: Sequence[Stretch],
    *,
    scale: float,
    cap: float | None,
) -> Float[Array, "B L heads H"]:
    """One softmax over all stretches, which are never laid side by side.

    Args:
      query: With their positions applied.
      stretches: What is attended to.
      scale: Scores are multiplied by it.
      cap: Then they are bent into plus or minus this; None leaves them.
    """
    shares = []
    for stretch in stretches:
        if stretch.route is None:
            shares.append(weigh(query, stretch, scale=scale, cap=cap))
        else:
            asked = query[stretch.route.rows.reshape(-1)]
            found = weigh(asked, stretch, scale=scale, cap=cap)
            shares += deal(found, stretch.route)
    return merge(shares, query)


def weigh(
    query: Float[Array, "B L heads H"],
    stretch: Stretch,
    reaches: Bool[Array, "B L"] | None = None,
    *,
    scale: float,
    cap: float | None,
) -> Share:
    """What one stretch adds to the softmax.

    All queries of a group and key head are one matrix, [G, K, S L R, H], so that a stretch costs
    plain batched products: written as one contraction over six dims, XLA's CPU backend is several
    times slower. Heads stay a dim of their own, which a mesh can spread.

    Args:
      query, scale, cap: As in `attend`.
      stretch: What is attended to.
      reaches: False where a query sends no gradient into keys and values; None where all do.
    """
    rows, length, heads, head_dim = query.shape
    groups, kv_heads = stretch.values.shape[:2]
    shape = (rows, length, kv_heads, heads // kv_heads)
    if reaches is not None:
        lets = jnp.broadcast_to(reaches[:, :, None, None], shape)
        reaches = _by_group(lets, groups)
    scores = _score((query * scale).reshape(*shape, head_dim), stretch, groups, cap, reaches)
    # Any constant gives the same softmax; the largest score keeps it in range.
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), LOWEST))
    weights = jnp.exp(scores - top[..., None])
    mixed = _mix(weights.astype(stretch.values.dtype), stretch.values, reaches)
    return Share(*(_by_row(x, shape) for x in (top, weights.sum(axis=-1), mixed)))


def deal(found: Share, route: Route) -> list[Share]:
    """What each row gets from the groups that it asks, in its own order; nothing from nowhere."""
    each = list(zip(found, (LOWEST, 0.0, 0.0), strict=True))
    return [
        Share(*(x.at[place].get(mode="fill", fill_value=nothing) for x, nothing in each))
        for place in jnp.unstack(route.places, axis=1)
    ]


def merge(
    shares: Sequence[Share], like: Float[Array, "B L heads H"]
) -> Float[Array, "B L heads H"]:
    """The softmax over all stretches, in shape and dtype of `like`; zeros where nothing is seen."""
    share = functools.reduce(add_up, shares)
    mixed = scale_each(share.mixed, 1.0 / jnp.where(share.total > 0, share.total, 1.0))
    return mixed.astype(like.dtype).reshape(like.shape)


def scale_each(x: Float[Array, "*rows D"], by: Float[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Every vector times its own number.

    Said as a product, so that the gradient of `by`, a sum over D, is one too: XLA's CPU backend
    takes up to 25 times as long for a multiplication that is followed by a sum.
    """
    return jnp.einsum("...d,...->...d", x, by, precision=jax.lax.Precision.HIGHEST)


def add_up(first: Share, second: Share) -> Share:
    """What two stretches add together."""
    top = jnp.maximum(first.top, second.top)
    x, y = jnp.exp(first.top - top), jnp.exp(second.top - top)
    mixed = first.mixed * x[..., None] + second.mixed * y[..., None]
    return Share(top, first.total * x + second.total * y, mixed)


def _score(
    query: Float[Array, "B L K R H"],
    stretch: Stretch,
    groups: int,
    cap: float | None,
    reaches: Bool[Array, "G K m"] | None,
) -> Float32[Array, "G K m T"]:
    """Scores of one stretch; -inf where a query does not see a token."""
    rows, length, kv_heads, repeats, _ = query.shape
    keys = stretch.keys
    keys = keys.keys if isinstance(keys, Turned) else keys.swapaxes(2, 3)
    scores = _mix(_by_group(query, groups), keys, reaches)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    apart = scores.reshape(groups, kv_heads, rows // groups, length, repeats, scores.shape[-1])
    if stretch.bias is not None:
        bias = stretch.bias.reshape(-1, kv_heads, repeats, length, scores.shape[-1])
        apart += jnp.moveaxis(bias, 2, 3)[:, :, None]
    visible = stretch.visible.reshape(groups, -1, *stretch.visible.shape[1:])
    return jnp.where(visible[:, None, :, :, None], apart, -jnp.inf).reshape(scores.shape)


def _mix(
    left: Float[Array, "G K m i"],
    right: Float[Array, "G K i o"],
    reaches: Bool[Array, "G K m"] | None,
) -> Float32[Array, "G K m o"]:
    """A product whose right side gets a gradient only from the rows that reach it."""
    return _product(left, right) if reaches is None else _cut_product(left, right, reaches)


def product(left: Array, right: Array, dtype: DTypeLike | None = None) -> Array:
    """The product of matrices, in their own dtype or in `dtype`.

    Accelerators round what is float32 to fewer bits before they multiply, unless told not to.
    """
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.matmul(left, right, precision=exact, preferred_element_type=dtype)


_product = functools.partial(product, dtype=jnp.float32)


@jax.custom_vjp
def _cut_product(left: Array, right: Array, reaches: Array) -> Array:
    return _product(left, right)


def _cut_forward(left: Array, right: Array, reaches: Array) -> tuple[Array, tuple]:
    return _product(left, right), (left, right, reaches)


def _cut_backward(kept: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, None]:
    left, right, reaches = kept
    to_left = _product(grad.astype(right.dtype), right.swapaxes(2, 3)).astype(left.dtype)
    reaching = jnp.where(reaches[..., None], grad, 0.0).astype(left.dtype)
    return to_left, _product(left.swapaxes(2, 3), reaching).astype(right.dtype), None


_cut_product.defvjp(_cut_forward, _cut_backward)


def _by_group(x: Array, groups: int) -> Array:
    """[B, L, K, R, ...] to [G, K, S L R, ...]."""
    x = jnp.moveaxis(x.reshape(groups, -1, *x.shape[1:]), 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[5:])


def _by_row(x: Array, shape: tuple[int, int, int, int]) -> Array:
    """[G, K, S L R, ...] back to [B, L, K, R, ...], which is `shape`."""
    _, length, _, repeats = shape
    x = x.reshape(*x.shape[:2], -1, length, repeats, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3).reshape(*shape, *x.shape[5:])
