"""What decoders differ in, as fields: norms, positions, windows, biases, wiring of a block."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
from jax import Array

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that any usual tensor axis divides it."""

_TANH_GELU = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
"""By the names that published configs use; three of them mean the same function."""


@dataclass(frozen=True)
class RopeScaling:
    """Longer rotary wavelengths, for texts longer than a model was first trained on.

    Attributes:
      factor: How many times longer.
      bands: None stretches all wavelengths. Otherwise (low, high, length): wavelengths below
        length / high stay, those above length / low are stretched, and between them it fades in.
    """

    factor: float
    bands: tuple[float, float, int] | None = None


ADAPTABLE = ("query", "key", "value", "out", "up", "gate", "down")
"""The matrices of a block, which low-rank adapters may be put beside."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: a matrix W computes with `W + alpha / rank * A B`, and only A and B learn.

    Attributes:
      rank: Columns of A and rows of B.
      alpha: What they add is multiplied by `alpha / rank`.
      targets: Names of the matrices in every block that have them, of `ADAPTABLE`.

    Source:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
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
      embedding_width: Length of an embedding where it is not `width`: matrices lie in between.
      embedding_scale: Embeddings of tokens are multiplied by it.
      norm: `rms` scales by the root mean square, `layer` also centres and has a bias.
      norm_epsilon: Added to the mean square.
      norm_offset: Added to the scale of every norm.
      norm_place: `before` normalises what goes into attention and MLP, `around` also what comes
        out of them; `after` normalises the sum instead.
      final_norm: Whether the last states are normalised.
      query_key_norm: Whether queries and keys are normalised, each head on its own.
      parallel: Whether the MLP reads what attention reads, and both are added at once.
      shared_norm: Whether a parallel block has one norm for both.
      activation: Of the MLP, a key of `ACTIVATIONS`.
      gated_mlp: Whether a second matrix gates the first.
      positions: `rotary` turns queries and keys, `learned` adds a vector to the embedding;
        `relative`, of encoder-decoders, adds to scores what their distance is worth.
      position_offset: Rows of the learned positions that come before position 0.
      rotary_dims: Dims of a head, the first ones, that are turned; None turns all.
      rotary_interleaved: Whether neighbouring dims make a pair, not dims half a head apart.
      rope_theta: Base of the rotary wavelengths; learned positions leave it unread.
      rope_scaling: What stretches those wavelengths.
      local_layers: Which layers see no more than `window`; () where none does.
      window: Tokens that a local layer sees: a token itself and those just before it.
      local_rope_theta: Base in local layers, never stretched; None where they are like the others.
      query_scalar: Queries are divided by its square root; None stands for `head_dim`.
      attention_cap: Scores of attention are bent into plus or minus this; None leaves them.
      logit_cap: The same for the scores of tokens to come, before their bias.
      head_scale: States are multiplied by it before the output projection.
      attention_bias: Whether queries, keys and values have biases.
      out_bias: Whether what attention gives has one.
      mlp_bias: Whether the matrices of the MLP have biases.
      tied_head: Whether the output projection is the embedding.
      head_bias: Whether the output projection has a bias.
      lora: The adapters that its matrices have; None for none.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    embedding_width: int | None = None
    embedding_scale: float = 1.0
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_place: Literal["before", "around", "after"] = "before"
    final_norm: bool = True
    query_key_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    position_offset: int = 0
    rotary_dims: int | None = None
    rotary_interleaved: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_layers: tuple[bool, ...] = ()
    window: int | None = None
    local_rope_theta: float | None = None
    query_scalar: float | None = None
    attention_cap: float | None = None
    head_scale: float = 1.0
    logit_cap: float | None = None
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    head_bias: bool = False
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is one of {known}; got {self.activation!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.heads}; got {self.kv_heads}.")
        if self.positions == "rotary" and self.turned_dims % 2:
            raise ValueError(f"rotary positions need an even head_dim; got {self.turned_dims}.")
        if self.parallel and self.norm_place != "before":
            raise ValueError(f"a parallel block has its norms before; got {self.norm_place!r}.")
        if any(self.local_layers) and (self.window or 0) < 1:
            raise ValueError(f"local layers need a window of 1 or more; got {self.window}.")
        if len(self.local_layers) not in (0, self.layers):
            raise ValueError(
                f"local_layers says for each of {self.layers} layers whether it is local; "
                f"got {len(self.local_layers)}."
            )

        if self.lora and "gate" in self.lora.targets and not self.gated_mlp:
            raise ValueError("adapters are asked for on gate, but no matrix gates this MLP.")

    @property
    def plain(self) -> "ModelConfig":
        """The same without adapters."""
        return replace(self, lora=None)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as held in memory."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def turned_dims(self) -> int:
        """Dims of a head that rotary positions turn."""
        return self.head_dim if self.rotary_dims is None else self.rotary_dims


@dataclass(frozen=True)
class EncoderDecoderConfig(ModelConfig):
    """What a decoder is made of, and the encoder whose states it attends to.

    What `ModelConfig` says holds for both, but `layers` are those of the decoder. Positions are
    relative, so that no text is too long.

    Attributes:
      encoder_layers: Blocks of the encoder.
      buckets: Distances are told apart in so many buckets, half of them for near ones.
      max_distance: Distances from here on are one bucket.
      start_id: The token that every text of the decoder begins with, not counted in the text.
    """

    encoder_layers: int = 1
    buckets: int = 32
    max_distance: int = 128
    start_id: int = 0
