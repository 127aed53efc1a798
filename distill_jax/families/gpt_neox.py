"""GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head."""

from distill_jax.families.fields import rope_scaling
from distill_jax.families.table import Family, Field, derived, number, rows

GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    fields={
        "vocab_size": Field("vocab_size", 50432),
        "width": Field("hidden_size", 6144),
        "layers": Field("num_hidden_layers", 44),
        "heads": Field("num_attention_heads", 64),
        "kv_heads": derived(lambda known: known["heads"]),
        "head_dim": derived(lambda known: known["width"] // known["heads"]),
        "mlp_width": Field("intermediate_size", 24576),
        "max_positions": Field("max_position_embeddings", 2048),
        "norm": derived("layer"),
        "norm_epsilon": number("layer_norm_eps", 1e-5),
        "parallel": Field("use_parallel_residual", True),
        "activation": Field("hidden_act", "gelu"),
        "gated_mlp": derived(False),
        "positions": derived("rotary"),
        "rotary_dims": Field(
            "rope_parameters.partial_rotary_factor",
            lambda known: known["head_dim"] // 4,
            ("rotary_pct",),
            decode=lambda part, known: int(known["head_dim"] * part),
            encode=lambda ours, known: 1.0 if ours is None else ours / known["head_dim"],
        ),
        "rope_scaling": rope_scaling(),
        "rope_theta": number("rope_parameters.rope_theta", 10000.0, ("rotary_emb_base",)),
        "attention_bias": Field("attention_bias", True),
        "out_bias": Field("attention_bias", True),
        "mlp_bias": derived(True),
        "tied_head": Field("tie_word_embeddings", False),
    },
    understood={},
    prefix="gpt_neox.",
    weights={
        "embedding": ("gpt_neox.embed_in.weight", "vocab embed"),
        **rows(
            "gpt_neox.layers.{}.",
            ("attention_norm.scale", "input_layernorm.weight", "norm"),
            ("attention_norm.bias", "input_layernorm.bias", "norm"),
            *(
                (f"attention.{ours}{ending}", f"attention.query_key_value.{kind}", layout)
                for ours, heads, part in (
                    ("query", "heads", "0/3"),
                    ("key", "kv_heads", "1/3"),
                    ("value", "kv_heads", "2/3"),
                )
                for ending, kind, layout in (
                    ("", "weight", f"({heads} {part} head_dim) embed"),
                    ("_bias", "bias", f"({heads} {part} head_dim)"),
                )
            ),
            ("attention.out", "attention.dense.weight", "embed (heads head_dim)"),
            ("attention.out_bias", "attention.dense.bias", "norm"),
            ("mlp_norm.scale", "post_attention_layernorm.weight", "norm"),
            ("mlp_norm.bias", "post_attention_layernorm.bias", "norm"),
            ("mlp.up", "mlp.dense_h_to_4h.weight", "mlp embed"),
            ("mlp.up_bias", "mlp.dense_h_to_4h.bias", "mlp"),
            ("mlp.down", "mlp.dense_4h_to_h.weight", "embed mlp"),
            ("mlp.down_bias", "mlp.dense_4h_to_h.bias", "norm"),
        ),
        "norm.scale": ("gpt_neox.final_layer_norm.weight", "norm"),
        "norm.bias": ("gpt_neox.final_layer_norm.bias", "norm"),
        "head": ("embed_out.weight", "vocab embed"),
    },
    ignored=(r"attention\.bias$", r"attention\.masked_bias$", r"rotary_emb\.inv_freq$"),
)
