"""The decoder: what families differ in as fields, one declaration per weight, one forward pass.

Letters: N layers, B rows, L tokens of a row, G groups of a segment, S rows of a group, T tokens of
a segment, K key and value heads, R query heads per key head, H head dim, D width, V padded
vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from distill_jax.student.attention import Stretch, Turns, attend, make_turns, rotate

Params = dict[str, Any]
"""Weights as nested dicts of arrays, those of all layers stacked on axis 0."""

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that any usual tensor axis divides it."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder is made of.

    Attributes:
      vocab_size: Rows of the published embedding; arrays hold `padded_vocab` rows.
      width: Length of the state of a token.
      layers: Blocks.
      heads: Query heads of a block.
      kv_heads: Key and value heads; divides `heads`.
      head_dim: Length of a query, a key and a value.
      mlp_width: Length inside the MLP.
      max_positions: Tokens that one text may have; learned positions end there.
      norm: `rms` scales by the root mean square, `layer` also centres and has a bias.
      norm_epsilon: Added to the mean square.
      activation: Of the MLP; `gelu_new` is the tanh form, `gelu` the exact one.
      gated_mlp: Whether a second matrix gates the first.
      positions: `rotary` turns queries and keys, `learned` adds a vector to the embedding.
      rope_theta: Base of the rotary wavelengths; learned positions leave it unread.
      attention_bias: Whether the four attention matrices have biases.
      mlp_bias: Whether the matrices of the MLP have biases.
      tied_head: Whether the output projection is the embedding.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is one of {known}; got {self.activation!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.heads}; got {self.kv_heads}.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim; got {self.head_dim}.")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as held in memory."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Segment(NamedTuple):
    """Context that later tokens attend to: one stretch of tokens of every group.

    Attributes:
      keys: With their positions applied.
      values: As projected.
      positions: Of the tokens in their texts.
      mask: True where a real token stands.
    """

    keys: Float[Array, "N G K T H"]
    values: Float[Array, "N G K T H"]
    positions: Int[Array, "G T"]
    mask: Bool[Array, "G T"]


def _weight(rngs: nnx.Rngs, axes: dict[str, int], *, std: float) -> nnx.Param:
    """Declares a weight: its logical axes, their sizes, and the spread that it is born with."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()))
    return nnx.Param(value, out_sharding=tuple(axes))


def _constant(axes: dict[str, int], value: float) -> nnx.Param:
    return nnx.Param(jnp.full(tuple(axes.values()), value, jnp.float32), out_sharding=tuple(axes))


def _add(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


def _multiply(x: Array, weight: nnx.Param, bias: nnx.Param | None, *, dims: int = 1) -> Array:
    """The product over the last `dims` dims of `x` and the first of `weight`.

    All tokens are one dim while it runs: XLA's CPU backend differentiates products of plain
    matrices up to 1.6 times faster than those of three dims.
    """
    matrix = weight[...].astype(x.dtype)
    tokens, out = x.shape[: x.ndim - dims], matrix.shape[dims:]
    flat = x.reshape(math.prod(tokens), -1) @ matrix.reshape(-1, math.prod(out))
    return _add(flat.reshape(*tokens, *out), bias)


class Norm(nnx.Module):
    """Normalises the state of every token, in float32 whatever comes in."""

    def __init__(self, config: ModelConfig):
        self.epsilon, self.centred = config.norm_epsilon, config.norm == "layer"
        self.scale = _constant({"norm": config.width}, 1.0)
        self.bias = _constant({"norm": config.width}, 0.0) if self.centred else None

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        wide = x.astype(jnp.float32)
        if self.centred:
            wide -= wide.mean(axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return _add(wide * self.scale[...][None, None], self.bias).astype(x.dtype)


class Attention(nnx.Module):
    """Every token looks at its own stretch, up to itself, and at all past segments."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = {"embed": config.width}
        queries = {"heads": config.heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        std, biased = config.width**-0.5, config.attention_bias
        out_std = (2 * config.layers * config.heads * config.head_dim) ** -0.5
        self.query = _weight(rngs, width | queries, std=std)
        self.key = _weight(rngs, width | keys, std=std)
        self.value = _weight(rngs, width | keys, std=std)
        self.out = _weight(rngs, queries | width, std=out_std)
        self.query_bias = _constant(queries, 0.0) if biased else None
        self.key_bias = _constant(keys, 0.0) if biased else None
        self.value_bias = _constant(keys, 0.0) if biased else None
        self.out_bias = _constant({"norm": config.width}, 0.0) if biased else None

    def __call__(
        self,
        x: Float[Array, "B L D"],
        turns: Turns | None,
        visible: Bool[Array, "B L L"],
        past: Sequence[Stretch],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B K L H"], Float[Array, "B K L H"]]:
        query = rotate(_multiply(x, self.query, self.query_bias), turns)
        key = rotate(_multiply(x, self.key, self.key_bias), turns)
        value = _multiply(x, self.value, self.value_bias)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = attend(query, [*past, Stretch(key, value, visible)])
        return _multiply(mixed, self.out, self.out_bias, dims=2), key, value


class Mlp(nnx.Module):
    """Widens the state of every token, bends it, and narrows it again."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inside = {"embed": config.width}, {"mlp": config.mlp_width}
        std, biased, gated = config.width**-0.5, config.mlp_bias, config.gated_mlp
        self.activation = config.activation
        self.up = _weight(rngs, width | inside, std=std)
        self.gate = _weight(rngs, width | inside, std=std) if gated else None
        self.down = _weight(
            rngs, inside | width, std=(2 * config.layers * config.mlp_width) ** -0.5
        )
        self.up_bias = _constant(inside, 0.0) if biased else None
        self.gate_bias = _constant(inside, 0.0) if biased and gated else None
        self.down_bias = _constant({"norm": config.width}, 0.0) if biased else None

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        bend = ACTIVATIONS[self.activation]
        inside = _multiply(x, self.up, self.up_bias)
        if self.gate is None:
            inside = bend(inside)
        else:
            inside *= bend(_multiply(x, self.gate, self.gate_bias))
        return _multiply(inside, self.down, self.down_bias)


class Block(nnx.Module):
    """Attention, then the MLP, each on the normalised state and added to it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = Mlp(config, rngs)


class Decoder(nnx.Module):
    """All weights of a student; the blocks are stacked on an axis named `layers`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embedding = {"vocab": config.padded_vocab, "embed": config.width}
        places = {"positions": config.max_positions, "embed": config.width}
        self.embedding = _weight(rngs, embedding, std=0.02)
        learned = config.positions == "learned"
        self.position_embedding = _weight(rngs, places, std=0.02) if learned else None
        stack = nnx.vmap(
            functools.partial(Block, config),
            in_axes=0,
            out_axes=0,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.blocks = nnx.split_rngs(splits=config.layers)(stack)(rngs)
        self.norm = Norm(config)
        tied = config.tied_head
        self.head = None if tied else _weight(rngs, embedding, std=config.width**-0.5)


@functools.cache
def _declare(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure, and its weights as shapes only."""
    with nnx.use_eager_sharding(False):  # axes are named here; the mesh comes later
        return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


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


def init_params(config: ModelConfig, key: PRNGKeyArray, shardings: Any) -> Params:
    """Random weights, born on the devices that keep them.

    Args:
      config: What to make.
      key: Decides the weights, whatever the shardings are.
      shardings: A tree of shardings like `abstract_params`.
    """

    def init(key: PRNGKeyArray) -> Params:
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key))))

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
    remat: bool = False,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> tuple[Float[Array, "B L D"], Segment]:
    """The states of one stretch of tokens, given the stretches before it.

    A token sees the tokens of its own row up to itself, and every token of its group's past
    segments; never one whose mask is False. Row b belongs to group b // (B // G) of a segment with
    G groups, so a segment with one group is shared by all rows, and is not copied for them.

    Args:
      config: What the weights are of.
      params: From `init_params` or a file.
      tokens: Ids below `config.vocab_size`.
      positions: Of the tokens in their texts, below `config.max_positions`.
      mask: True where a real token stands. States of other tokens are finite and mean nothing.
      past: Segments that `forward` returned; their numbers of groups divide B.
      compute_dtype: Of products and states. Norms, softmax and rotary tables are float32.
      remat: Recompute each block in the backward pass instead of keeping what is inside it.
      constrain: Applied to the states between blocks, to keep them laid out on a mesh.

    Returns:
      The states after the final norm, and this stretch as a segment with B groups.
    """
    model = nnx.merge(_declare(config)[0], params)
    x = model.embedding[...][tokens].astype(compute_dtype)
    if model.position_embedding is not None:
        x += model.position_embedding[...][positions].astype(compute_dtype)
    turns = (
        make_turns(positions, head_dim=config.head_dim, theta=config.rope_theta)
        if config.positions == "rotary"
        else None
    )
    visible = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & mask[:, None]

    def step(x: Array, layer: tuple[Block, list[tuple[Array, Array]]]):
        block, pairs = layer
        seen = [
            Stretch(k, v, segment.mask[:, None])
            for (k, v), segment in zip(pairs, past, strict=True)
        ]
        change, key, value = block.attention(block.attention_norm(x), turns, visible, seen)
        x = x + change
        return constrain(x + block.mlp(block.mlp_norm(x))), (key, value)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    pairs = [(segment.keys, segment.values) for segment in past]
    x, (keys, values) = jax.lax.scan(step, constrain(x), (model.blocks, pairs))
    return model.norm(x), Segment(keys, values, positions, mask)


def head(
    config: ModelConfig, params: Params
) -> tuple[Float[Array, "D V"], Float32[Array, " V"] | None]:
    """The output projection, and what is added after it.

    The second is None, or -inf for the rows that pad the vocabulary: a softmax over
    `hidden @ weight + bias` never gives them anything.
    """
    weight = (params["embedding"] if config.tied_head else params["head"]).T
    if config.padded_vocab == config.vocab_size:
        return weight, None
    real = jnp.arange(config.padded_vocab) < config.vocab_size
    return weight, jnp.where(real, 0.0, -jnp.inf)


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "*rows D"]
) -> Float32[Array, "*rows V"]:
    """Scores of every token to come; -inf for the rows that pad the vocabulary."""
    weight, bias = head(config, params)
    scores = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
