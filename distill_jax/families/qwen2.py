"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from dataclasses import replace

from distill_jax.families.llama import LLAMA
from distill_jax.families.table import Field, derived

QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    fields={
        **LLAMA.fields,
        "vocab_size": Field("vocab_size", 151936),
        "mlp_width": Field("intermediate_size", 22016),
        "max_positions": Field("max_position_embeddings", 32768),
        "attention_bias": derived(True),
        "out_bias": derived(False),
        "mlp_bias": derived(False),
    },
    understood={**LLAMA.understood, "use_sliding_window": (False,)},
)
