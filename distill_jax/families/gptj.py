"""GPT-J: attention and MLP side by side behind one norm, interleaved rotary, a bias on the head."""

from dataclasses import replace

from distill_jax.families.gpt2 import GPT2
from distill_jax.families.table import Field, derived, rows

GPTJ = replace(
    GPT2,
    architecture="GPTJForCausalLM",
    model_type="gptj",
    fields={
        **GPT2.fields,
        "vocab_size": Field("vocab_size", 50400),
        "width": Field("n_embd", 4096),
        "layers": Field("n_layer", 28),
        "heads": Field("n_head", 16),
        "max_positions": Field("n_positions", 2048),
        "parallel": derived(True),
        "shared_norm": derived(True),
        "positions": derived("rotary"),
        "rotary_dims": Field("rotary_dim", 64),
        "rotary_interleaved": derived(True),
        "attention_bias": derived(False),
        "out_bias": derived(False),
        "tied_head": Field("tie_word_embeddings", False),
        "head_bias": derived(True),
    },
    understood={},
    weights={
        **GPT2.weights,
        **rows(
            "transformer.h.{}.",
            ("attention.query", "attn.q_proj.weight", "(heads head_dim) embed"),
            ("attention.key", "attn.k_proj.weight", "(kv_heads head_dim) embed"),
            ("attention.value", "attn.v_proj.weight", "(kv_heads head_dim) embed"),
            ("attention.out", "attn.out_proj.weight", "embed (heads head_dim)"),
            ("mlp.up", "mlp.fc_in.weight", "mlp embed"),
            ("mlp.up_bias", "mlp.fc_in.bias", "mlp"),
            ("mlp.down", "mlp.fc_out.weight", "embed mlp"),
            ("mlp.down_bias", "mlp.fc_out.bias", "norm"),
        ),
        "head_bias": ("lm_head.bias", "vocab"),
    },
)
