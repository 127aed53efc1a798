"""Llama: gated MLP, root-mean-square norms, rotary positions, grouped key and value heads."""

from distill_jax.families.table import Family, Field, derived

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    fields={
        "vocab_size": Field("vocab_size", 32000),
        "width": Field("hidden_size", 4096),
        "layers": Field("num_hidden_layers", 32),
        "heads": Field("num_attention_heads", 32),
        "kv_heads": Field("num_key_value_heads", lambda known: known["heads"]),
        "head_dim": Field("head_dim", lambda known: known["width"] // known["heads"]),
        "mlp_width": Field("intermediate_size", 11008),
        "max_positions": Field("max_position_embeddings", 2048),
        "norm": derived("rms"),
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "activation": Field("hidden_act", "silu"),
        "gated_mlp": derived(True),
        "positions": derived("rotary"),
        "rope_theta": Field("rope_parameters.rope_theta", 10000.0, older="rope_theta"),
        "attention_bias": Field("attention_bias", False),
        "mlp_bias": Field("mlp_bias", False),
        "tied_head": Field("tie_word_embeddings", False),
    },
    understood={
        "rope_parameters.rope_type": ("default",),
        "rope_parameters.partial_rotary_factor": (1.0,),
        "rope_scaling.rope_type": ("default",),
        "rope_scaling.type": ("default",),
    },
    prefix="model.",
    weights={
        "embedding": ("model.embed_tokens.weight", "vocab embed"),
        "blocks.attention_norm.scale": ("model.layers.{}.input_layernorm.weight", "norm"),
        **{
            f"blocks.attention.{ours}": (f"model.layers.{{}}.self_attn.{name}", layout)
            for ours, name, layout in (
                ("query", "q_proj.weight", "(heads head_dim) embed"),
                ("query_bias", "q_proj.bias", "(heads head_dim)"),
                ("key", "k_proj.weight", "(kv_heads head_dim) embed"),
                ("key_bias", "k_proj.bias", "(kv_heads head_dim)"),
                ("value", "v_proj.weight", "(kv_heads head_dim) embed"),
                ("value_bias", "v_proj.bias", "(kv_heads head_dim)"),
                ("out", "o_proj.weight", "embed (heads head_dim)"),
                ("out_bias", "o_proj.bias", "norm"),
            )
        },
        "blocks.mlp_norm.scale": ("model.layers.{}.post_attention_layernorm.weight", "norm"),
        "blocks.mlp.gate": ("model.layers.{}.mlp.gate_proj.weight", "mlp embed"),
        "blocks.mlp.gate_bias": ("model.layers.{}.mlp.gate_proj.bias", "mlp"),
        "blocks.mlp.up": ("model.layers.{}.mlp.up_proj.weight", "mlp embed"),
        "blocks.mlp.up_bias": ("model.layers.{}.mlp.up_proj.bias", "mlp"),
        "blocks.mlp.down": ("model.layers.{}.mlp.down_proj.weight", "embed mlp"),
        "blocks.mlp.down_bias": ("model.layers.{}.mlp.down_proj.bias", "norm"),
        "norm.scale": ("model.norm.weight", "norm"),
        "head": ("lm_head.weight", "vocab embed"),
    },
    ignored=(r"rotary_emb\.inv_freq$",),
)
