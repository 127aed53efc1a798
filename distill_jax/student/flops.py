"""Arithmetic of the student: what a step costs."""

from dataclasses import replace
from functools import partial

from distill_jax.student.architecture import EncoderDecoderConfig, ModelConfig
from distill_jax.student.objective import Objective
from distill_jax.student.tree import Counts


def block_weights(config: ModelConfig) -> int:
    """Weights of the matrices that every token passes, all blocks together."""
    attention = 2 * config.width * config.head_dim * (config.heads + config.kv_heads)
    mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
    return config.layers * (attention + mlp)


def forward_flops(config: ModelConfig, *, tokens: float, predictions: float, pairs: float) -> float:
    """Operations of a forward pass; a backward pass has twice as many.

    Args:
      config: What the student looks like.
      tokens: That pass the blocks.
      predictions: Tokens whose logits are computed.
      pairs: A token and one that it sees, itself included, over all tokens.
    """
    head = (config.embedding_width or config.width) * config.vocab_size
    attention = 2 * config.layers * config.heads * config.head_dim * pairs
    return 2.0 * (block_weights(config) * tokens + head * predictions + attention)


def step_flops(config: ModelConfig, counts: Counts, objective: Objective) -> float:
    """Operations that a step has to do, forward and backward, without padding or recomputing.

    DPO's reference is a forward pass more. Where only adapters are trained, the large matrices have
    no gradient, and adapters cost next to nothing.
    """
    count = partial(
        forward_flops,
        config,
        tokens=float(counts.useful - counts.read),
        predictions=float(counts.predictions),
    )
    matrices, everything = count(pairs=0.0), count(pairs=float(counts.pairs))
    if isinstance(config, EncoderDecoderConfig):
        read, pairs = float(counts.read), float(counts.read_pairs)
        written = float(counts.useful) - read
        added = _cross_flops(config, read=read, written=written)
        encoder = replace(config, layers=config.encoder_layers)
        encode = partial(forward_flops, encoder, tokens=read, predictions=0.0)
        matrices += added + encode(pairs=0.0)
        everything += added + encode(pairs=pairs)
    passes = 4 if objective.reflection == "dpo" else 3
    return passes * everything - (matrices if config.lora else 0.0)


def _cross_flops(config: EncoderDecoderConfig, *, read: float, written: float) -> float:
    """Of the matrices between decoder and encoder: two for the tokens of either."""
    return 4.0 * config.layers * config.width * config.head_dim * config.heads * (read + written)
