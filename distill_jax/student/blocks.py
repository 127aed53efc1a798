"""The parts of a decoder: one declaration per weight, and what each part computes.

Letters: B rows, L tokens of a row, K key and value heads, H head dim, D width, n heads of queries
or keys.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distill_jax.student.architecture import ACTIVATIONS, Lora, ModelConfig
from distill_jax.student.attention import Turns, product, rotate, scale_each

Look = Callable[[Array, Array, Array], tuple[Array, Any]]
"""Queries [B, L, heads, H], keys and values [B, L, K, H] to what attention mixed, shaped like the
queries, and whatever the caller keeps: who sees whom is the caller's business."""


Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes of a block: nothing, all but the products with weights (so
attention and everything of elements), or all of it. The first needs most memory, the last most
time; on a CPU the second is the fastest, too, as writing and reading costs more than computing."""

_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def recompute(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The step of a scan over blocks, of which the backward pass recomputes what `remat` says."""
    if remat == "none":
        return step
    return jax.checkpoint(step, prevent_cse=False, policy=_POLICIES[remat])


def matrix(rngs: nnx.Rngs, axes: dict[str, int], *, std: float) -> nnx.Param:
    """Declares a weight: its logical axes, their sizes, and the spread that it is born with."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()))
    return nnx.Param(value, out_sharding=tuple(axes))


def constant(axes: dict[str, int], value: float) -> nnx.Param:
    """Declares a weight that is born with one value everywhere."""
    return nnx.Param(jnp.full(tuple(axes.values()), value, jnp.float32), out_sharding=tuple(axes))


def add(x: Array, bias: nnx.Param | None) -> Array:
    """`x` with a bias, if there is one, in the dtype of `x`."""
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


class Adapter(nnx.Module):
    """Two thin matrices beside a large one; it is born as nothing, since `b` is zero."""

    def __init__(self, rngs: nnx.Rngs, enter: dict[str, int], leave: dict[str, int], *, lora: Lora):
        self.scale, rank = lora.scale, {"rank": lora.rank}
        self.a = matrix(rngs, enter | rank, std=math.prod(enter.values()) ** -0.5)
        self.b = constant(rank | leave, 0.0)

    def __call__(self, x: Float[Array, "tokens i"]) -> Float[Array, "tokens o"]:
        a, b = (weight[...].astype(x.dtype) for weight in (self.a, self.b))
        thin = product(x, a.reshape(x.shape[-1], -1))
        return product(thin * self.scale, b.reshape(thin.shape[-1], -1))


def adapt(
    rngs: nnx.Rngs,
    name: str,
    enter: dict[str, int],
    leave: dict[str, int],
    *,
    config: ModelConfig,
) -> Adapter | None:
    """The adapter of the matrix `name` from axes `enter` to axes `leave`, if it has one."""
    if config.lora is None or name not in config.lora.targets:
        return None
    return Adapter(rngs, enter, leave, lora=config.lora)


def multiply(
    x: Array,
    weight: nnx.Param,
    bias: nnx.Param | None = None,
    adapter: Adapter | None = None,
    *,
    dims: int = 1,
) -> Array:
    """The product over the last `dims` dims of `x` and the first of `weight`.

    What an adapter adds is computed from `x`: no other large matrix is made. All tokens are one dim
    while it runs: XLA's CPU backend differentiates products of plain matrices up to 1.6 times
    faster than those of three dims.
    """
    array = weight[...].astype(x.dtype)
    tokens, out = x.shape[: x.ndim - dims], array.shape[dims:]
    flat = x.reshape(math.prod(tokens), -1)
    mixed = product(flat, array.reshape(-1, math.prod(out)))
    if adapter is not None:
        mixed += adapter(flat)
    return add(mixed.reshape(*tokens, *out), bias)


class Norm(nnx.Module):
    """Normalises the last dim, in float32 whatever comes in."""

    def __init__(self, config: ModelConfig, axes: dict[str, int]):
        self.epsilon, self.centred = config.norm_epsilon, config.norm == "layer"
        self.offset = config.norm_offset
        self.scale = constant(axes, 1.0 - self.offset)
        self.bias = constant(axes, 0.0) if self.centred else None

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        wide = x.astype(jnp.float32)
        if self.centred:
            wide -= wide.mean(axis=-1, keepdims=True)
        wide = scale_each(wide, jax.lax.rsqrt(jnp.square(wide).mean(axis=-1) + self.epsilon))
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        return add(wide * jnp.broadcast_to(scale, wide.shape), self.bias).astype(x.dtype)


class Attention(nnx.Module):
    """Queries, keys and values of every token, and the way back from what was mixed."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, size = {"embed": config.width}, {"head_dim": config.head_dim}
        queries, keys = {"heads": config.heads} | size, {"kv_heads": config.kv_heads} | size
        std, biased = config.width**-0.5, config.attention_bias
        out_std = (2 * config.layers * config.heads * config.head_dim) ** -0.5
        self.interleaved = config.rotary_interleaved
        self.query = matrix(rngs, width | queries, std=std)
        self.key = matrix(rngs, width | keys, std=std)
        self.value = matrix(rngs, width | keys, std=std)
        self.out = matrix(rngs, queries | width, std=out_std)
        self.query_bias = constant(queries, 0.0) if biased else None
        self.key_bias = constant(keys, 0.0) if biased else None
        self.value_bias = constant(keys, 0.0) if biased else None
        self.out_bias = constant({"norm": config.width}, 0.0) if config.out_bias else None
        adapter = partial(adapt, rngs, config=config)
        self.query_adapter = adapter("query", width, queries)
        self.key_adapter = adapter("key", width, keys)
        self.value_adapter = adapter("value", width, keys)
        self.out_adapter = adapter("out", queries, width)
        self.query_norm = Norm(config, size) if config.query_key_norm else None
        self.key_norm = Norm(config, size) if config.query_key_norm else None

    def __call__(
        self, x: Float[Array, "B L D"], turns: Turns | None, look: Look
    ) -> tuple[Float[Array, "B L D"], Any]:
        mixed, kept = look(self.ask(x, turns), *self.offer(x, turns))
        return self.finish(mixed), kept

    def ask(self, x: Float[Array, "B L D"], turns: Turns | None) -> Float[Array, "B L n H"]:
        """The queries of tokens."""
        query = multiply(x, self.query, self.query_bias, self.query_adapter)
        return self._place(query, self.query_norm, turns)

    def offer(
        self, x: Float[Array, "B L D"], turns: Turns | None
    ) -> tuple[Float[Array, "B L n H"], Float[Array, "B L n H"]]:
        """The keys and values of tokens."""
        key = multiply(x, self.key, self.key_bias, self.key_adapter)
        value = multiply(x, self.value, self.value_bias, self.value_adapter)
        return self._place(key, self.key_norm, turns), value

    def finish(self, mixed: Float[Array, "B L n H"]) -> Float[Array, "B L D"]:
        """The change of the state, from what attention mixed."""
        return multiply(mixed, self.out, self.out_bias, self.out_adapter, dims=2)

    def _place(
        self, x: Float[Array, "B L n H"], norm: Norm | None, turns: Turns | None
    ) -> Float[Array, "B L n H"]:
        normal = x if norm is None else norm(x)
        return normal if turns is None else rotate(normal, turns, interleaved=self.interleaved)


class Mlp(nnx.Module):
    """Widens the state of every token, bends it, and narrows it again."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inside = {"embed": config.width}, {"mlp": config.mlp_width}
        std, biased, gated = config.width**-0.5, config.mlp_bias, config.gated_mlp
        self.activation = config.activation
        self.up = matrix(rngs, width | inside, std=std)
        self.gate = matrix(rngs, width | inside, std=std) if gated else None
        self.down = matrix(rngs, inside | width, std=(2 * config.layers * config.mlp_width) ** -0.5)
        self.up_bias = constant(inside, 0.0) if biased else None
        self.gate_bias = constant(inside, 0.0) if biased and gated else None
        self.down_bias = constant({"norm": config.width}, 0.0) if biased else None
        adapter = partial(adapt, rngs, config=config)
        self.up_adapter = adapter("up", width, inside)
        self.gate_adapter = adapter("gate", width, inside)
        self.down_adapter = adapter("down", inside, width)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        bend = ACTIVATIONS[self.activation]
        inside = multiply(x, self.up, self.up_bias, self.up_adapter)
        if self.gate is None:
            inside = bend(inside)
        else:
            inside *= bend(multiply(x, self.gate, self.gate_bias, self.gate_adapter))
        return multiply(inside, self.down, self.down_bias, self.down_adapter)


class Block(nnx.Module):
    """Attention and the MLP, each normalised and added to the state."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, around = {"norm": config.width}, config.norm_place == "around"
        self.parallel, self.place = config.parallel, config.norm_place
        self.attention_norm = Norm(config, size)
        self.attention = Attention(config, rngs)
        self.attention_out_norm = Norm(config, size) if around else None
        self.mlp_norm = None if config.parallel and config.shared_norm else Norm(config, size)
        self.mlp = Mlp(config, rngs)
        self.mlp_out_norm = Norm(config, size) if around else None

    def __call__(
        self, x: Float[Array, "B L D"], turns: Turns | None, look: Look
    ) -> tuple[Float[Array, "B L D"], Any]:
        """The states after the block, and what `look` keeps."""
        entering = self._enter(x, self.attention_norm)
        change, kept = self.attention(entering, turns, look)
        if self.mlp_norm is None:
            return x + change + self.mlp(entering), kept
        if self.parallel:
            return x + change + self.mlp(self.mlp_norm(x)), kept
        x = self._leave(x, change, self.attention_norm, self.attention_out_norm)
        change = self.mlp(self._enter(x, self.mlp_norm))
        return self._leave(x, change, self.mlp_norm, self.mlp_out_norm), kept

    def _enter(self, x: Array, norm: Norm) -> Array:
        return x if self.place == "after" else norm(x)

    def _leave(self, x: Array, change: Array, norm: Norm, out_norm: Norm | None) -> Array:
        if self.place == "after":
            return norm(x + change)
        return x + (change if out_norm is None else out_norm(change))
