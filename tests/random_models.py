"""Small random models with unequal dims, ours and the same made by transformers."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from distill_jax.student.model import (
    ModelConfig,
    Params,
    abstract_params,
    forward,
    logical_axes,
)
from distill_jax.student.sharding import EXAM_RULES, make_mesh, shardings

LLAMA = ModelConfig(
    vocab_size=301,
    width=48,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=10,
    mlp_width=70,
    max_positions=64,
)
GPT2 = ModelConfig(
    vocab_size=131,
    width=48,
    layers=3,
    heads=4,
    kv_heads=4,
    head_dim=12,
    mlp_width=100,
    max_positions=40,
    norm="layer",
    activation="gelu_new",
    gated_mlp=False,
    positions="learned",
    attention_bias=True,
    mlp_bias=True,
    tied_head=True,
)
VARIANTS = {
    "llama": LLAMA,
    "llama-biased-tied": dataclasses.replace(
        LLAMA, attention_bias=True, mlp_bias=True, tied_head=True, rope_theta=500.0
    ),
    "llama-relu": dataclasses.replace(LLAMA, activation="relu", kv_heads=6, head_dim=8),
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tied_head=False),
    "gpt2-exact-gelu": dataclasses.replace(GPT2, activation="gelu", mlp_width=192),
}


def whole(config: ModelConfig, mesh=None, rules=EXAM_RULES):
    """Shardings on a mesh; without one, on the first device."""
    mesh = mesh or make_mesh(1, 1, 1)
    return shardings(mesh, logical_axes(config), abstract_params(config), rules)


def make_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random weights on one device; norms and biases too, so that none can be left out."""
    rng, rows = np.random.default_rng(seed), {"embedding", "head"}

    def make(path, leaf) -> jax.Array:
        std = 0.1 if leaf.ndim < 3 and path[0].key not in rows else leaf.shape[-1] ** -0.5
        value = rng.normal(scale=std, size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(value, jnp.float32)

    return jax.tree.map_with_path(make, abstract_params(config))


def run(config: ModelConfig, params: Params, tokens, positions, mask, past=(), **options):
    """`forward`, compiled, in float32, on numpy arrays."""
    options = {"compute_dtype": jnp.float32, **options}
    return _compiled(config, params, tokens, positions, mask, past, **options)


_compiled = jax.jit(forward, static_argnames=("config", "compute_dtype", "remat", "constrain"))


def make_rows(lengths: list[int], *, vocab_size: int, left: bool = False, seed: int = 0):
    """Rows of unequal length as ids, positions and mask, padded on one side."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    tokens = rng.integers(0, vocab_size, (len(lengths), longest))
    steps, need = np.arange(longest)[None], np.array(lengths)[:, None]
    mask = steps >= longest - need if left else steps < need
    return tokens, np.clip(mask.cumsum(axis=1) - 1, 0, None), mask


def make_published(directory: Path, config: ModelConfig):
    """A random transformers model of the same shape, saved in `directory`. Skips without torch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch, the reference")
    import torch

    make = _published_gpt2 if config.positions == "learned" else _published_llama
    torch.manual_seed(3)
    model = make(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(directory)
    return model.eval()


def _published_gpt2(config: ModelConfig):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=None if config.mlp_width == 4 * config.width else config.mlp_width,
            n_positions=config.max_positions,
            activation_function=config.activation,
            tie_word_embeddings=config.tied_head,
        )
    )


def _published_llama(config: ModelConfig):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_positions,
            hidden_act=config.activation,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_head,
        )
    )


def published_logits(model, tokens, positions, mask) -> tuple[np.ndarray, np.ndarray]:
    """What transformers computes: scores, and states after the final norm."""
    import torch

    with torch.no_grad():
        out = model(
            torch.tensor(np.asarray(tokens)),
            attention_mask=torch.tensor(np.asarray(mask)).long(),
            position_ids=torch.tensor(np.asarray(positions)),
            output_hidden_states=True,
        )
    return out.logits.numpy(), out.hidden_states[-1].numpy()
