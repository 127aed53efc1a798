"""Published checkpoints by shape: their configs give the arrays that transformers makes of them."""

import math
from typing import Any

import pytest
import transformers

from distill_jax.families.config_json import find_family, read_config
from distill_jax.families.layout import find_placements

_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
_NEOX = {"model_type": "gpt_neox", "rotary_pct": 0.25, "tie_word_embeddings": False}
_QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "use_sliding_window": False}
_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 16,
}

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "openai-community/gpt2-large": (
        774_030_080,
        {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    ),
    "EleutherAI/gpt-neo-2.7B": (
        2_651_307_520,
        {
            "model_type": "gpt_neo",
            "hidden_size": 2560,
            "num_layers": 32,
            "num_heads": 20,
            "attention_types": [[["global", "local"], 16]],
            "intermediate_size": None,
        },
    ),
    "EleutherAI/gpt-j-6b": (
        6_050_882_784,
        {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64},
    ),
    "facebook/opt-350m": (
        331_196_416,
        _OPT
        | {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "do_layer_norm_before": False,
        },
    ),
    "facebook/opt-iml-1.3b": (
        1_315_758_080,
        _OPT
        | {
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "ffn_dim": 8192,
            "do_layer_norm_before": True,
        },
    ),
    "EleutherAI/pythia-410m": (
        405_334_016,
        _NEOX
        | {
            "vocab_size": 50304,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "EleutherAI/gpt-neox-20b": (
        20_554_567_680,
        _NEOX
        | {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
        },
    ),
    "meta-llama/Llama-2-7b-hf": (
        6_738_415_616,
        {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "meta-llama/Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Qwen/Qwen2.5-1.5B": (
        1_543_714_304,
        _QWEN
        | {
            "model_type": "qwen2",
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        _QWEN
        | {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
        },
    ),
    "google/gemma-2-2b": (
        2_614_341_888,
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "sliding_window": 4096,
        },
    ),
    "google/gemma-3-1b-pt": (
        999_885_952,
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "google-t5/t5-large": (737_668_096, _T5 | {"d_ff": 4096}),
}
"""By hub id: its number of parameters, and what its `config.json` says of its shape."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_config_gives_the_published_arrays(name):
    torch = pytest.importorskip("torch")
    count, published = SHAPES[name]
    family = find_family(published)
    placements = find_placements(read_config(family, published), family)
    ours = {name: place.shape for place in placements for name in place.names}
    assert sum(map(math.prod, ours.values())) == count
    config = transformers.CONFIG_MAPPING[published["model_type"]](**published)
    with torch.device("meta"):
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_config(config)
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if "embed_out.weight" in ours:  # what files call the head of GPT-NeoX; transformers renames it
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert ours == theirs
