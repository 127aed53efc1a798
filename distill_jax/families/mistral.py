"""Mistral: Llama whose layers all see a sliding window, or all see everything."""

from dataclasses import replace

from distill_jax.families.llama import LLAMA
from distill_jax.families.table import Field, derived

MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    model_type="mistral",
    fields={
        **LLAMA.fields,
        "kv_heads": Field("num_key_value_heads", 8),
        "mlp_width": Field("intermediate_size", 14336),
        "max_positions": Field("max_position_embeddings", 131072),
        "attention_bias": derived(False),
        "out_bias": derived(False),
        "mlp_bias": derived(False),
        "window": Field("sliding_window", 4096, nullable=True),
        "local_layers": derived(lambda known: (known["window"] is not None,) * known["layers"]),
    },
)
