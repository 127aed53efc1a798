"""GPT-2: plain MLP, layer norms, learned positions, biases, matrices stored in by out."""

from distill_jax.families.table import Family, Field, derived

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    fields={
        "vocab_size": Field("vocab_size", 50257),
        "width": Field("n_embd", 768),
        "layers": Field("n_layer", 12),
        "heads": Field("n_head", 12),
        "kv_heads": derived(lambda known: known["heads"]),
        "head_dim": derived(lambda known: known["width"] // known["heads"]),
        "mlp_width": Field("n_inner", lambda known: 4 * known["width"]),
        "max_positions": Field("n_positions", 1024),
        "norm": derived("layer"),
        "norm_epsilon": Field("layer_norm_epsilon", 1e-5),
        "activation": Field("activation_function", "gelu_new"),
        "gated_mlp": derived(False),
        "positions": derived("learned"),
        "attention_bias": derived(True),
        "mlp_bias": derived(True),
        "tied_head": Field("tie_word_embeddings", True),
    },
    understood={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    prefix="transformer.",
    weights={
        "embedding": ("transformer.wte.weight", "vocab embed"),
        "position_embedding": ("transformer.wpe.weight", "positions embed"),
        **{
            f"blocks.{ours}": (f"transformer.h.{{}}.{name}", layout)
            for ours, name, layout in (
                ("attention_norm.scale", "ln_1.weight", "norm"),
                ("attention_norm.bias", "ln_1.bias", "norm"),
                ("attention.query", "attn.c_attn.weight", "embed (0/3 heads head_dim)"),
                ("attention.query_bias", "attn.c_attn.bias", "(0/3 heads head_dim)"),
                ("attention.key", "attn.c_attn.weight", "embed (1/3 kv_heads head_dim)"),
                ("attention.key_bias", "attn.c_attn.bias", "(1/3 kv_heads head_dim)"),
                ("attention.value", "attn.c_attn.weight", "embed (2/3 kv_heads head_dim)"),
                ("attention.value_bias", "attn.c_attn.bias", "(2/3 kv_heads head_dim)"),
                ("attention.out", "attn.c_proj.weight", "(heads head_dim) embed"),
                ("attention.out_bias", "attn.c_proj.bias", "norm"),
                ("mlp_norm.scale", "ln_2.weight", "norm"),
                ("mlp_norm.bias", "ln_2.bias", "norm"),
                ("mlp.up", "mlp.c_fc.weight", "embed mlp"),
                ("mlp.up_bias", "mlp.c_fc.bias", "mlp"),
                ("mlp.down", "mlp.c_proj.weight", "mlp embed"),
                ("mlp.down_bias", "mlp.c_proj.bias", "norm"),
            )
        },
        "norm.scale": ("transformer.ln_f.weight", "norm"),
        "norm.bias": ("transformer.ln_f.bias", "norm"),
        "head": ("lm_head.weight", "vocab embed"),
    },
    ignored=(r"attn\.bias$", r"attn\.masked_bias$"),
)
