"""Qwen3: Llama whose queries and keys are normalised in every head."""

from dataclasses import replace

from distill_jax.families.llama import LLAMA
from distill_jax.families.table import Field, derived, rows

QWEN3 = replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    fields={
        **LLAMA.fields,
        "vocab_size": Field("vocab_size", 151936),
        "head_dim": Field("head_dim", 128),
        "mlp_width": Field("intermediate_size", 22016),
        "max_positions": Field("max_position_embeddings", 32768),
        "mlp_bias": derived(False),
        "query_key_norm": derived(True),
    },
    understood={**LLAMA.understood, "use_sliding_window": (False,)},
    weights={
        **LLAMA.weights,
        **rows(
            "model.layers.{}.self_attn.",
            ("attention.query_norm.scale", "q_norm.weight", "head_dim"),
            ("attention.key_norm.scale", "k_norm.weight", "head_dim"),
        ),
    },
)
