"""The decoder: all its weights, one forward pass, and the scores of tokens to come.

What declares, makes and names weights, and what scores tokens, serves encoder-decoders as well.

Letters: B rows, L tokens of a row, T tokens of a segment, D width, E length of an embedding, V
padded vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from distill_jax.student.architecture import EncoderDecoderConfig, ModelConfig
from distill_jax.student.attention import Segment, Stretch, Turns, attend, make_turns, product
from distill_jax.student.blocks import Block, Norm, Remat, constant, matrix, multiply, recompute
from distill_jax.student.encoder_decoder import EncoderDecoder

Params = dict[str, Any]
"""Weights as nested dicts of arrays, those of all layers stacked on axis 0."""

WIDE = ("norm", "distances", "head_bias")
"""How the names of weights end that are used in float32, whatever the states are."""


class Decoder(nnx.Module):
    """All weights of a decoder; the blocks are stacked on an axis named `layers`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, vocab = {"embed": config.width}, {"vocab": config.padded_vocab}
        outer = {"embed": config.embedding_width or config.width}
        projection = None if config.embedding_width is None else {"embedding": outer["embed"]}
        rows = config.max_positions + config.position_offset
        learned, std = config.positions == "learned", config.width**-0.5
        self.scale, self.offset = config.embedding_scale, config.position_offset
        self.embedding = matrix(rngs, vocab | outer, std=0.02)
        self.project_in = matrix(rngs, projection | width, std=std) if projection else None
        self.position_embedding = (
            matrix(rngs, {"positions": rows} | width, std=0.02) if learned else None
        )
        stack = nnx.vmap(
            functools.partial(Block, config),
            in_axes=0,
            out_axes=0,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.blocks = nnx.split_rngs(splits=config.layers)(stack)(rngs)
        self.norm = Norm(config, {"norm": config.width}) if config.final_norm else None
        self.project_out = matrix(rngs, width | projection, std=std) if projection else None
        self.head = None if config.tied_head else matrix(rngs, vocab | outer, std=std)
        self.head_bias = constant(vocab, 0.0) if config.head_bias else None

    def embed(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], dtype: DTypeLike
    ) -> Float[Array, "B L D"]:
        """The states that enter the first block."""
        x = self.embedding[...][tokens].astype(dtype) * self.scale
        if self.project_in is not None:
            x = multiply(x, self.project_in)
        if self.position_embedding is not None:
            places = positions + self.offset
            x += self.position_embedding[...][places].astype(dtype)
        return x

    def finish(self, x: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        """What the output projection reads."""
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else multiply(x, self.project_out)


def _make(config: ModelConfig, rngs: nnx.Rngs) -> Decoder | EncoderDecoder:
    """The student that a config describes."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config, rngs)
    return Decoder(config, rngs)


@functools.cache
def _declare(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A student's structure, and its weights as shapes only."""
    with nnx.use_eager_sharding(False):  # axes are named here; the mesh comes later
        return nnx.split(nnx.eval_shape(lambda: _make(config, nnx.Rngs(0))))


def with_params(config: ModelConfig, params: Params) -> Any:
    """The module that a config describes, with its weights."""
    return nnx.merge(_declare(config)[0], params)


def abstract_params(config: ModelConfig) -> Params:
    """The shapes of all weights, as a tree of `jax.ShapeDtypeStruct`."""
    return nnx.to_pure_dict(_declare(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The names of the axes of all weights, as a tree of tuples."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda weight: weight.replace(weight.get_metadata()["out_sharding"]),
            _declare(config)[1],
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


def narrow(params: Params, dtype: DTypeLike) -> Params:
    """Weights as the student multiplies with them: what it would make of them anyway.

    Args:
      params: All weights, or a part of the tree.
      dtype: Of products. Those that are `WIDE` are not rounded.
    """

    def cast(path: Any, weight: Array) -> Array:
        wide = any(part.key.endswith(WIDE) for part in path)
        return weight if wide else weight.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def init_params(config: ModelConfig, key: PRNGKeyArray, shardings: Any) -> Params:
    """Random weights, born on the devices that keep them.

    Args:
      config: What to make.
      key: Decides the weights, whatever the shardings are.
      shardings: A tree of shardings like `abstract_params`.
    """

    def init(key: PRNGKeyArray) -> Params:
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(_make(config, nnx.Rngs(params=key))))

    return jax.jit(init, out_shardings=shardings)(key)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    past: Sequence[Segment] = (),
    *,
    compute_dtype: DTypeLike,
    unroll: bool = False,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> tuple[Float[Array, "B L E"], Segment]:
    """The states of one stretch of tokens, given the stretches before it.

    A token sees the tokens of its own row up to itself, and every token of its group's past
    segments; in local layers only those in its window; never one whose mask is False. Row b belongs
    to group b // (B // G) of a segment with G groups, so a segment with one group is shared by all
    rows, and is not copied for them. A segment with a route says itself who belongs where.

    Args:
      config: What the weights are of.
      params: From `init_params` or a file.
      tokens: Ids below `config.vocab_size`.
      positions: Of the tokens in their texts, below `config.max_positions`.
      mask: True where a real token stands. States of other tokens are finite and mean nothing.
      past: Segments that `forward` returned; their numbers of groups divide B.
      compute_dtype: Of products and states. Norms, softmax and rotary tables are float32.
      unroll: Write the layers one after the other, not as a loop, which copies each layer's weights
        and past out of the stacks that hold them. Slower to compile.
      constrain: Applied to the states between blocks, to keep them laid out on a mesh.

    Returns:
      The states that the output projection reads, after the final norm, and this stretch as a
      segment with B groups.
    """
    sights = [mask[:, None] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]]
    sights += [segment.mask[:, None] for segment in past]
    near = _near(config, positions, past)

    def look(local: Array | None, pairs: Any, query: Array, key: Array, value: Array):
        own, *others = sights if local is None else _narrow(sights, near, local)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        seen = [
            Stretch(k, v, visible, segment.route)
            for (k, v), visible, segment in zip(pairs, others, past, strict=True)
        ]
        return attend(query, [*seen, Stretch(key, value, own)], **softmax(config)), (key, value)

    pairs = [(segment.keys, segment.values) for segment in past]
    x, (keys, values) = run_blocks(
        config, params, tokens, positions, look, pairs,
        compute_dtype=compute_dtype, remat="none", unroll=unroll, constrain=constrain,
    )  # fmt: skip
    return x, Segment(keys, values, positions, mask)


def run_blocks(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    look: Callable[[Array | None, Any, Array, Array, Array], tuple[Array, Any]],
    pairs: Any = (),
    *,
    compute_dtype: DTypeLike,
    remat: Remat,
    unroll: bool = False,
    constrain: Callable[[Array], Array],
) -> tuple[Float[Array, "B L E"], Any]:
    """The states of tokens, however they lie: only `look` knows who sees whom.

    Args:
      config, params, tokens, positions, compute_dtype, unroll, constrain: As in `forward`.
      look: A `blocks.Look` behind two more arguments: whether the layer is local, None where no
        layer is, and the layer's part of `pairs`.
      pairs: Arrays with the layers on axis 0.
      remat: What the backward pass recomputes.

    Returns:
      As `forward`, and what `look` kept, the layers on axis 0.
    """
    model = with_params(config, params)
    turns = _turns(config, positions)

    def step(x: Array, layer: tuple[Block, Array | None, Any]) -> tuple[Array, Any]:
        block, local, parts = layer
        x, kept = block(x, _choose(turns, local), functools.partial(look, local, parts))
        return constrain(x), kept

    local = jnp.array(config.local_layers) if any(config.local_layers) else None
    x = constrain(model.embed(tokens, positions, compute_dtype))
    layers = (model.blocks, local, pairs)
    x, kept = jax.lax.scan(recompute(step, remat), x, layers, unroll=unroll)
    return model.finish(x), kept


def softmax(config: ModelConfig) -> dict[str, Any]:
    """How scores of attention are scaled and capped."""
    scale = (config.query_scalar or config.head_dim) ** -0.5
    return {"scale": scale, "cap": config.attention_cap}


def _near(
    config: ModelConfig, positions: Int[Array, "B L"], past: Sequence[Segment]
) -> list[Bool[Array, "rows L T"]]:
    """Which tokens of its own stretch, then of each past one, are in the window of each token.

    Positions decide, so that a branch of a tree, or a token decoded behind a shared prefix, sees
    what it would see in a flat row.
    """
    if config.window is None or not any(config.local_layers):
        return []
    near = [positions[:, :, None] - positions[:, None] < config.window]
    for segment in past:
        route = segment.route
        asking = positions if route is None else positions[route.rows.reshape(-1)]
        asked = jnp.repeat(segment.positions, asking.shape[0] // segment.positions.shape[0], axis=0)
        near.append(asking[:, :, None] - asked[:, None] < config.window)
    return near


def _narrow(sights: list[Array], near: list[Array], local: Bool[Array, ""]) -> list[Array]:
    """What a layer sees: in the window if it is local, everything otherwise."""
    rows = [
        jnp.repeat(x, y.shape[0] // x.shape[0], axis=0) for x, y in zip(sights, near, strict=True)
    ]
    return [x & (y | ~local) for x, y in zip(rows, near, strict=True)]


def _turns(config: ModelConfig, positions: Int[Array, "B L"]) -> list[Turns]:
    """Rotary angles: none, those of all layers, or those of global and of local layers."""
    if config.positions != "rotary":
        return []
    make = functools.partial(make_turns, positions, dims=config.turned_dims)
    turns = [make(theta=config.rope_theta, scaling=config.rope_scaling)]
    if any(config.local_layers) and config.local_rope_theta is not None:
        turns.append(make(theta=config.local_rope_theta, scaling=None))
    return turns


def _choose(turns: list[Turns], local: Bool[Array, ""] | None) -> Turns | None:
    """The angles of one layer."""
    if local is None or len(turns) < 2:
        return turns[0] if turns else None
    cos, sin = (jnp.where(local, near, far) for far, near in zip(*turns, strict=True))
    return cos, sin


def head(
    config: ModelConfig, params: Params
) -> tuple[Float[Array, "E V"], Float32[Array, " V"] | None]:
    """The output projection, and what is added after it.

    The second is None where that is nothing. It holds -inf for the rows that pad the vocabulary: a
    softmax over `hidden @ weight + bias` never gives them anything.
    """
    weight = (params["embedding"] if config.tied_head else params["head"]).T
    bias = params["head_bias"] if config.head_bias else None
    if config.padded_vocab > config.vocab_size:
        real = jnp.arange(config.padded_vocab) < config.vocab_size
        bias = jnp.where(real, 0.0 if bias is None else bias, -jnp.inf)
    return weight, bias


def head_params(config: ModelConfig, params: Params) -> Params:
    """The weights that `logits` reads."""
    names = ["embedding" if config.tied_head else "head"] + ["head_bias"] * config.head_bias
    return {name: params[name] for name in names}


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "*rows E"]
) -> Float32[Array, "*rows V"]:
    """Scores of every token to come; -inf for the rows that pad the vocabulary."""
    weight, bias = head(config, params)
    hidden = hidden * config.head_scale
    scores = product(hidden, weight.astype(hidden.dtype), jnp.float32)
    if config.logit_cap is not None:
        scores = config.logit_cap * jnp.tanh(scores / config.logit_cap)
    return scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
