"""The device programs of an exam, bound to a student and a mesh.

What an exam asks of a student is here: to read what all prompts share, to read prompts, and to
score the tokens that may follow.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distill_jax.slots import CALL, PAGE, Move, Reading, Sizes
from distill_jax.student import decode
from distill_jax.student.architecture import EncoderDecoderConfig, ModelConfig
from distill_jax.student.attention import Segment
from distill_jax.student.decode import Chosen, Context, Pages, Pools, Rows, Stops
from distill_jax.student.model import (
    Params,
    abstract_params,
    forward,
    logical_axes,
    logits,
    narrow,
    with_params,
)
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import AXES, BATCH, EXAM_RULES, shardings
from distill_jax.tokenizer import padded_length

REPLICAS = ("data", "fsdp")
"""Mesh axes along which the exam holds copies of the weights."""

Weights = dict[str, Any]
"""A student's weights as an exam uses them: each layer apart, and the head ready to multiply."""

Shared = tuple[Context, ...]
"""What all prompts begin with: one context, or none."""


class Engine:
    """A student ready to sit exams, with any weights. Compiles each program when first needed.

    Each replica of the weights advances its own rows without a word to the others. Arrays of the
    host go in and come out; what stays on the devices is weights, shared tokens and pools.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        end_id: int,
        newlines: np.ndarray,
        sampling: Sampling,
        compute_dtype: DTypeLike,
    ):
        """Binds all that stays the same from exam to exam.

        Args:
          config: What the student looks like.
          mesh: Of the exam, such as `exam_mesh` gives.
          end_id: Ends a completion; -1 for none.
          newlines: As in `decode.Stops`.
          sampling: How rows draw.
          compute_dtype: Of products, weights and pages. Norms, logits and softmax are float32.
        """
        self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(compute_dtype)
        self.desks = math.prod(mesh.shape[axis] for axis in REPLICAS)
        self._sampling, self._last_position = sampling, config.max_positions - 1
        self._ends = (np.array(end_id, np.int32), newlines)
        self.page_shards = count_page_shards(config, mesh.shape["tensor"])
        heads = "tensor" if self.page_shards > 1 else None
        pages = self._pages = NamedSharding(mesh, P(REPLICAS, heads))
        self._shared = NamedSharding(mesh, P(None, heads))
        everywhere = NamedSharding(mesh, P())
        self._layout = _layout(config, mesh)
        self._apart = partial(lay_apart, config, self.dtype)
        self.lay_out: Callable[[Params], Weights] = jax.jit(self._apart, out_shardings=self._layout)
        self._make = jax.jit(self._empty, static_argnums=0, out_shardings=pages)
        self._move = jax.jit(
            self._spread(decode.move_pages, BATCH, BATCH, out=BATCH), out_shardings=pages
        )
        self._read_shared = jax.jit(self._trace_shared)
        self._read_prompts = jax.jit(
            self._spread(self._trace_prompts, P(), P(), BATCH, BATCH, out=BATCH),
            donate_argnums=2,
            out_shardings=pages,
        )
        self._advance = jax.jit(
            self._trace_advance,
            static_argnames="share",
            donate_argnums=3,
            out_shardings=(pages, everywhere),
        )

    @cached_property
    def _stops(self) -> Stops:
        return Stops(*_put(self.mesh, P(), self._ends))

    def make_pools(self, sizes: Sizes) -> Pools:
        """Empty pages on every desk."""
        return Pools(self._make(sizes.prompt_pages), self._make(sizes.own_pages))

    def move(self, pools: Pools, move: Move | None) -> Pools:
        """Pools of another size with the pages that are in use; the old ones are gone.

        One array after the other, so that memory need not hold both pools.
        """
        if move is None:
            return pools

        def one(array: jax.Array, old: jax.Array) -> jax.Array:
            moved = self._move(array, old)
            array.delete()
            return moved

        numbers = _put(self.mesh, BATCH, move)
        return Pools(
            *(
                jax.tree.map(partial(one, old=old), pages)
                for pages, old in zip(pools, numbers, strict=True)
            )
        )

    def read_shared(self, weights: Weights, tokens: Sequence[int]) -> Shared:
        """Reads what all prompts begin with; nothing if that is nothing."""
        if not tokens:
            return ()
        padded = np.zeros((1, padded_length(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        mask = np.arange(padded.shape[1])[None] < len(tokens)
        return (self._read_shared(weights, *_put(self.mesh, P(), (padded, mask))),)

    def read_prompts(
        self, weights: Weights, shared: Shared, pools: Pools, reading: Reading
    ) -> Pools:
        """Reads prompts into their pages."""
        arrays = _put(self.mesh, BATCH, reading)
        return pools._replace(prompts=self._read_prompts(weights, shared, pools.prompts, arrays))

    def advance(
        self,
        weights: Weights,
        shared: Shared,
        pools: Pools,
        rows: Sequence[np.ndarray],
        enough: np.ndarray,
        *,
        share: int,
    ) -> tuple[Pools, Chosen]:
        """Lets all rows choose tokens, as `decode.advance`, and waits for them."""
        arrays = Rows(*_put(self.mesh, BATCH, rows))
        (limit,) = _put(self.mesh, BATCH, (enough,))
        own, chosen = self._advance(
            weights, shared, pools.prompts, pools.own, arrays, limit, self._stops, share=share
        )
        # Fetched before anything else is sent: CPU meshes lock up on long queues.
        return pools._replace(own=own), jax.device_get(chosen)

    def lower_advance(
        self,
        common: int,
        sizes: Sizes,
        rows: Sequence[np.ndarray],
        enough: np.ndarray,
        *,
        share: int,
    ) -> jax.stages.Lowered:
        """The program of `advance` for arrays of these shapes, which need no devices.

        Args:
          common: Tokens that all prompts begin with.
          sizes: Of each desk.
          rows, enough, share: As in `advance`.
        """
        weights = _give(jax.eval_shape(self._apart, abstract_params(self.config)), self._layout)
        shared: Shared = ()
        if common:
            shape = (1, padded_length(common))
            tokens, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
            context = jax.eval_shape(self._trace_shared, weights, tokens, mask)
            everywhere = NamedSharding(self.mesh, P())
            shared = (
                _give(context, everywhere)._replace(pages=_give(context.pages, self._shared)),
            )
        prompts, own = (
            _give(jax.eval_shape(partial(self._empty, count)), self._pages) for count in sizes[1:]
        )
        lines = NamedSharding(self.mesh, BATCH)
        rest = (Rows(*_give(list(rows), lines)), _give(enough, lines))
        stops = Stops(*_give(self._ends, NamedSharding(self.mesh, P())))
        return self._advance.lower(weights, shared, prompts, own, *rest, stops, share=share)

    def _forward(self, weights: Weights) -> decode.Forward:
        """Feeds rows their tokens. An encoder-decoder's look at their prompt and their own."""

        def run(
            tokens: jax.Array, places: jax.Array, mask: jax.Array, past: Sequence[Segment] = ()
        ) -> tuple[jax.Array, Segment]:
            config = self.config
            params = _whole(config, weights)  # where it is used, as `Context.stack`
            if isinstance(config, EncoderDecoderConfig):
                model = with_params(config, params)
                return model.decode(tokens, *past, places, dtype=self.dtype, unroll=True)
            return forward(
                config, params, tokens, places, mask, past, compute_dtype=self.dtype, unroll=True
            )

        return run

    def _read(self, weights: Weights) -> decode.Forward:
        """Makes of prompts what rows attend to."""
        if not isinstance(self.config, EncoderDecoderConfig):
            return self._forward(weights)

        def run(
            tokens: jax.Array, places: jax.Array, mask: jax.Array, past: Sequence[Segment]
        ) -> tuple[jax.Array, Segment]:
            model = with_params(self.config, _whole(self.config, weights))
            states = model.encode(tokens, mask, dtype=self.dtype)
            return states, model.remember(states, mask)

        return run

    def _score(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        return logits(self.config, {**weights, **_head(self.config, weights)}, hidden)

    def _empty(self, count: int) -> Pages:
        config = self.config
        return decode.make_pages(
            self.desks * count,
            PAGE,
            heads=config.kv_heads,
            head_dim=config.head_dim,
            layers=config.layers,
            dtype=self.dtype,
        )

    def _trace_shared(self, weights: Weights, tokens: jax.Array, mask: jax.Array) -> Context:
        return decode.read_shared(
            self._forward(weights), tokens, mask, last_position=self._last_position
        )

    def _trace_prompts(
        self, weights: Weights, shared: Shared, prompts: Pages, reading: Sequence[jax.Array]
    ) -> Pages:
        return decode.read_prompts(
            self._read(weights), shared, prompts, *reading, last_position=self._last_position
        )

    def _trace_advance(self, *arrays: Any, share: int) -> tuple[Pages, Chosen]:
        def local(
            weights: Weights,
            shared: Shared,
            prompts: Pages,
            own: Pages,
            rows: Rows,
            enough: jax.Array,
            stops: Stops,
        ) -> tuple[Pages, Chosen]:
            return decode.advance(
                self._forward(weights),
                partial(self._score, weights),
                shared,
                Pools(prompts, own),
                rows,
                stops,
                enough[0],
                tokens=CALL,
                share=share,
                sampling=self._sampling,
                last_position=self._last_position,
            )

        specs = (P(), P(), BATCH, BATCH, BATCH, BATCH, P())
        return self._spread(local, *specs, out=BATCH)(*arrays)

    def _spread(self, function: Callable[..., Any], *specs: P, out: P) -> Callable[..., Any]:
        """Runs on every replica by itself; only the tensor axis is left to the compiler."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=out,
            axis_names=set(REPLICAS),
            check_vma=False,
        )


def lay_apart(config: ModelConfig, dtype: DTypeLike, params: Params) -> Weights:
    """Every layer that decodes on its own, and the head as a matrix from states to logits.

    A layer that lies in a stack is copied out of it for each use; and on CPUs a product with a
    transposed matrix is summed in another order for few rows than for many.
    """
    params = narrow(params, dtype)
    stack = _stack_name(config)
    layers = [jax.tree.map(lambda x, i=i: x[i], params[stack]) for i in range(config.layers)]
    head = params[_head_name(config)].T
    return {**_without_head(params), stack: layers, "unembedding": head}


def _without_head(tree: Params) -> Params:
    """What is kept of a tree beside the unembedding, which a head of its own would repeat."""
    return {name: value for name, value in tree.items() if name != "head"}


def _whole(config: ModelConfig, weights: Weights) -> Params:
    """The weights as `forward` knows them. The stacks are taken apart again and never made."""
    stack = _stack_name(config)
    layers = jax.tree.map(lambda *layers: jnp.stack(layers), *weights[stack])
    rest = {name: weight for name, weight in weights.items() if name != "unembedding"}
    return {**_head(config, weights), **rest, stack: layers}


def _head(config: ModelConfig, weights: Weights) -> Params:
    """The output projection under the name that `logits` looks for."""
    return {_head_name(config): weights["unembedding"].T}


def _layout(config: ModelConfig, mesh: Mesh) -> Any:
    """Shardings of what `lay_apart` gives."""
    axes, stack = logical_axes(config), _stack_name(config)
    layer = jax.tree.map(
        lambda names: names[1:], axes[stack], is_leaf=lambda node: isinstance(node, tuple)
    )
    apart = {
        **_without_head(axes),
        stack: [layer] * config.layers,
        "unembedding": axes[_head_name(config)][::-1],
    }
    shapes = jax.eval_shape(partial(lay_apart, config, jnp.float32), abstract_params(config))
    return shardings(mesh, apart, shapes, EXAM_RULES)


def _stack_name(config: ModelConfig) -> str:
    return "decoder" if isinstance(config, EncoderDecoderConfig) else "blocks"


def _head_name(config: ModelConfig) -> str:
    return "embedding" if config.tied_head else "head"


def exam_mesh(mesh: Mesh, num_bytes: int, memory: int | None) -> Mesh:
    """The same devices with the shortest tensor axis at which the weights leave room for pages.

    Args:
      mesh: That of training.
      num_bytes: Of all weights as the exam holds them.
      memory: Bytes of a device; None where nobody knows, and everything fits.

    Example:
      >>> from distill_jax.student.sharding import make_mesh
      >>> mesh = make_mesh(1, 4, 2)
      >>> [dict(exam_mesh(mesh, 10, memory).shape)["tensor"] for memory in (None, 40, 19, 2)]
      [1, 1, 2, 8]
    """
    devices = mesh.devices.size
    tensor = exam_tensor(devices, num_bytes, memory)
    grid = mesh.devices.reshape(devices // tensor, 1, tensor)
    return Mesh(grid, AXES, axis_types=mesh.axis_types)


def count_page_shards(config: ModelConfig, tensor: int) -> int:
    """Devices that pages are spread over: those of the tensor axis, if each gets whole heads."""
    return tensor if config.kv_heads % tensor == 0 else 1


def exam_tensor(devices: int, num_bytes: int, memory: int | None) -> int:
    """The length of that axis. Args as in `exam_mesh`."""
    fits = (
        size
        for size in range(1, devices + 1)
        if devices % size == 0 and (memory is None or 2 * num_bytes <= memory * size)
    )
    return next(fits, devices)


def _give(tree: Any, layout: Any) -> Any:
    """The shapes of a tree with shardings: a tree of them, or one for all."""
    if isinstance(layout, NamedSharding):
        layout = jax.tree.map(lambda _: layout, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, layout
    )


def _put(mesh: Mesh, spec: P, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Lays host arrays, the same on every host, on the mesh."""
    layout = NamedSharding(mesh, spec)
    return [jax.make_array_from_callback(x.shape, layout, x.__getitem__) for x in arrays]
