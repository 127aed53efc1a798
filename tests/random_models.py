"""Small random models with unequal dims, ours and the same made by transformers."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from distill_jax.families.config_json import find_family, read_config
from distill_jax.student.model import (
    ModelConfig,
    Params,
    abstract_params,
    forward,
    logical_axes,
)
from distill_jax.student.sharding import EXAM_RULES, TRAIN_RULES, make_mesh, shardings

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
    out_bias=True,
    mlp_bias=True,
    tied_head=True,
)

_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 100}
_GPT2 |= {"n_positions": 40}
_LLAMA = {
    "vocab_size": 301,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 70,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_LOCAL = _LLAMA | {"num_hidden_layers": 4, "sliding_window": 4}
_OPT = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 70,
    "max_position_embeddings": 40,
}
_NEOX = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 70,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2-untied": ("GPT2", _GPT2 | {"tie_word_embeddings": False}),
    "gpt2-exact-gelu": ("GPT2", _GPT2 | {"n_inner": None, "activation_function": "gelu"}),
    "gpt-neo": (
        "GPTNeo",
        {
            "vocab_size": 131,
            "hidden_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 70,
            "max_position_embeddings": 40,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 4,
        },
    ),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 8}),
    "opt": ("OPT", _OPT),
    "opt-350m": (
        "OPT",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    ),
    "opt-unbiased": ("OPT", _OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "gpt-neox": ("GPTNeoX", _NEOX),
    "gpt-neox-serial": (
        "GPTNeoX",
        _NEOX
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": _LINEAR | {"partial_rotary_factor": 0.5},
        },
    ),
    "llama": ("Llama", _LLAMA),
    "llama-biased-tied": (
        "Llama",
        _LLAMA
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "llama-relu": (
        "Llama",
        _LLAMA | {"hidden_act": "relu", "num_key_value_heads": 6, "head_dim": 8},
    ),
    "llama-linear": ("Llama", _LLAMA | {"rope_parameters": _LINEAR}),
    "llama-3": ("Llama", _LLAMA | {"rope_parameters": _LLAMA3}),
    "qwen2": ("Qwen2", _LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _LLAMA),
    "gemma2": ("Gemma2", _LOCAL | {"query_pre_attn_scalar": 24}),
    "gemma2-uncapped": (
        "Gemma2",
        _LOCAL
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        _LOCAL
        | {
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "mistral": ("Mistral", _LOCAL),
    "mistral-global": ("Mistral", _LOCAL | {"sliding_window": None}),
}
"""By name: a transformers config class without its ending, and what is passed to it."""


def published_config(name: str) -> transformers.PreTrainedConfig:
    """The config of one of `PUBLISHED`, as transformers makes it."""
    kind, fields = PUBLISHED[name]
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    architectures = [kind.removesuffix("Text") + ending]
    return getattr(transformers, f"{kind}Config")(**fields, architectures=architectures)


@functools.cache
def variant(name: str) -> ModelConfig:
    """One of `PUBLISHED` as ours."""
    published = json.loads(published_config(name).to_json_string())
    return read_config(find_family(published), published)


def whole(config: ModelConfig, mesh=None, rules=EXAM_RULES):
    """Shardings on a mesh; without one, on the first device."""
    mesh = mesh or make_mesh(1, 1, 1)
    return shardings(mesh, logical_axes(config), abstract_params(config), rules)


def make_params(config: ModelConfig, seed: int = 0, mesh=None) -> Params:
    """Random weights as training lays them out; norms and biases too, so that none is left out."""
    rng, rows = np.random.default_rng(seed), {"embedding", "head"}

    def make(path, leaf) -> np.ndarray:
        std = 0.1 if leaf.ndim < 3 and path[0].key not in rows else config.width**-0.5
        value = rng.normal(scale=std, size=leaf.shape) + (path[-1].key == "scale")
        return value.astype(np.float32)

    params = jax.tree.map_with_path(make, abstract_params(config))
    return jax.device_put(params, whole(config, mesh, TRAIN_RULES))


def run(config: ModelConfig, params: Params, tokens, positions, mask, past=(), **options):
    """`forward`, compiled, in float32, on numpy arrays."""
    options = {"compute_dtype": jnp.float32, **options}
    return _compiled(config, params, tokens, positions, mask, past, **options)


_compiled = jax.jit(forward, static_argnames=("config", "compute_dtype", "constrain"))


def make_rows(lengths: list[int], *, vocab_size: int, left: bool = False, seed: int = 0):
    """Rows of unequal length as ids, positions and mask, padded on one side."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    tokens = rng.integers(0, vocab_size, (len(lengths), longest))
    steps, need = np.arange(longest)[None], np.array(lengths)[:, None]
    mask = steps >= longest - need if left else steps < need
    return tokens, np.clip(mask.cumsum(axis=1) - 1, 0, None), mask


def make_published(directory: Path, name: str) -> Any:
    """A random transformers model of `PUBLISHED`, saved in `directory`. Skips without torch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch, the reference")
    import torch

    torch.manual_seed(3)
    config = published_config(name)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(directory)
    return model.eval()


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
    return out.logits.float().numpy(), out.hidden_states[-1].float().numpy()
