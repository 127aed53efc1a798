"""Arithmetic of the student: what a step costs, and what a device could do."""

from collections.abc import Mapping
from functools import partial

from distill_jax.student.architecture import ModelConfig
from distill_jax.student.tree import Counts

PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 operations per second of a device, by how the name of its kind begins.

Source: the makers' data sheets."""


def peak_flops(kind: str) -> float | None:
    """What one device could do at most; None for kinds whose figure is not published.

    Example:
      >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
      (989000000000000.0, None)
    """
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


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


def step_flops(config: ModelConfig, counts: Counts) -> float:
    """Operations that a step has to do, forward and backward, without padding or recomputing.

    Where only adapters are trained, the large matrices have no gradient, and adapters cost next to
    nothing.
    """
    tokens, predictions = float(counts.useful), float(counts.predictions)
    count = partial(forward_flops, config, tokens=tokens, predictions=predictions)
    total = 3 * count(pairs=float(counts.pairs))
    return total - count(pairs=0.0) if config.lora else total
