"""Gemma 2: norms around attention and MLP, capped scores, every second layer local."""

from dataclasses import replace

from distill_jax.families.fields import layer_types, one_in
from distill_jax.families.llama import LLAMA
from distill_jax.families.table import Field, derived, number, rows

GEMMA2 = replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    fields={
        **LLAMA.fields,
        "vocab_size": Field("vocab_size", 256000),
        "width": Field("hidden_size", 2304),
        "layers": Field("num_hidden_layers", 26),
        "heads": Field("num_attention_heads", 8),
        "kv_heads": Field("num_key_value_heads", 4),
        "head_dim": Field("head_dim", 256),
        "mlp_width": Field("intermediate_size", 9216),
        "max_positions": Field("max_position_embeddings", 8192),
        "embedding_scale": derived(lambda known: known["width"] ** 0.5),
        "norm_offset": derived(1.0),
        "norm_place": derived("around"),
        "activation": Field("hidden_activation", "gelu_pytorch_tanh"),
        "window": Field("sliding_window", 4096, nullable=True),
        "local_layers": layer_types(one_in(2)),
        "query_scalar": number("query_pre_attn_scalar", 256.0),
        "attention_cap": number("attn_logit_softcapping", 50.0, nullable=True),
        "logit_cap": number("final_logit_softcapping", 30.0, nullable=True),
        "mlp_bias": derived(False),
        "tied_head": Field("tie_word_embeddings", True),
    },
    understood={**LLAMA.understood, "use_bidirectional_attention": (False,)},
    weights={
        **LLAMA.weights,
        **rows(
            "model.layers.{}.",
            ("attention_out_norm.scale", "post_attention_layernorm.weight", "norm"),
            ("mlp_norm.scale", "pre_feedforward_layernorm.weight", "norm"),
            ("mlp_out_norm.scale", "post_feedforward_layernorm.weight", "norm"),
        ),
    },
)
