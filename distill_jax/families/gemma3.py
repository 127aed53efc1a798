"""Gemma 3, text only: Gemma 2 with query and key norms, and a rotary base for local layers."""

from dataclasses import replace

from distill_jax.families.fields import layer_types, one_in, rope_scaling
from distill_jax.families.gemma2 import GEMMA2
from distill_jax.families.qwen3 import QWEN3
from distill_jax.families.table import Field, derived, number

_GLOBAL, _LOCAL = "rope_parameters.full_attention", "rope_parameters.sliding_attention"

GEMMA3 = replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fields={
        **GEMMA2.fields,
        "vocab_size": Field("vocab_size", 262208),
        "max_positions": Field("max_position_embeddings", 131072),
        "query_key_norm": derived(True),
        "rope_scaling": rope_scaling(_GLOBAL),
        "rope_theta": number(f"{_GLOBAL}.rope_theta", 1e6, ("rope_theta",)),
        "local_layers": layer_types(one_in(6)),
        "local_rope_theta": number(f"{_LOCAL}.rope_theta", 1e4, ("rope_local_base_freq",)),
        "attention_cap": derived(None),
        "logit_cap": number("final_logit_softcapping", None),
    },
    understood={
        "use_bidirectional_attention": (False,),
        "sliding_window_pattern": (6,),
        f"{_LOCAL}.rope_type": ("default",),
    },
    weights={**QWEN3.weights, **GEMMA2.weights},
)
