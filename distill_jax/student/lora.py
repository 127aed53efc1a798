"""Low-rank adapters as a part of the weights: taken apart, put together, merged.

A tree of weights holds the adapter of a matrix beside it: `query`, and `query_adapter` with `a` and
`b`. What is trained is such a tree with adapters only, what stays is the rest.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from distill_jax.student.model import ModelConfig, Params, init_params

ENDING = "_adapter"


def split(params: Params) -> tuple[Params, Params]:
    """The adapters of a tree of weights or of what stands for weights, and the rest.

    Example:
      >>> split({"mlp": {"up": 1, "up_adapter": {"a": 2, "b": 3}}, "norm": 4})
      ({'mlp': {'up_adapter': {'a': 2, 'b': 3}}}, {'mlp': {'up': 1}, 'norm': 4})
    """
    adapters, rest = {}, {}
    for name, value in params.items():
        if name.endswith(ENDING):
            adapters[name] = value
        elif isinstance(value, dict):
            inner, rest[name] = split(value)
            adapters |= {name: inner} if inner else {}
        else:
            rest[name] = value
    return adapters, rest


def join(first: Params, second: Params) -> Params:
    """What `split` took apart, as one tree."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        both[name] = join(first[name], second[name])
    return both


def init_adapters(config: ModelConfig, key: PRNGKeyArray, shardings: Any) -> Params:
    """Adapters that add nothing yet. Args as in `model.init_params`."""

    def init(key: PRNGKeyArray) -> Params:
        return split(init_params(config, key, shardings))[0]

    return jax.jit(init, out_shardings=split(shardings)[0])(key)


def merge(config: ModelConfig, params: Params) -> Params:
    """Plain weights that compute what weights with adapters do, without them.

    Args:
      config: Of the weights; says by how much adapters count.
      params: All weights, adapters included.
    """
    assert config.lora is not None, "there is nothing to merge"
    adapters, rest = split(params)
    return _merge(adapters, rest, config.lora.scale)


def _merge(adapters: Params, rest: Params, scale: float) -> Params:
    merged = {}
    for name, value in rest.items():
        adapter = adapters.get(name + ENDING)
        if isinstance(value, dict):
            merged[name] = _merge(adapters.get(name, {}), value, scale)
        else:
            merged[name] = value if adapter is None else value + scale * _product(**adapter)
    return merged


def _product(a: Array, b: Array) -> Array:
    """What an adapter's matrices are together, for every layer of the stack."""
    return jax.vmap(partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST))(a, b)
