"""GPT-Neo: GPT-2 with a local layer after every global one, and scores that are not scaled."""

from dataclasses import replace
from typing import Any

from distill_jax.families.gpt2 import GPT2
from distill_jax.families.table import Field, Known, derived, rows


def _decode(said: list[Any], known: Known) -> tuple[bool, ...]:
    """Local layers from [[names, times], ...]."""
    return tuple(name == "local" for names, times in said for name in names * times)


def _encode(local: tuple[bool, ...], known: Known) -> list[Any]:
    return [[["local" if here else "global" for here in local], 1]]


GPT_NEO = replace(
    GPT2,
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    fields={
        **GPT2.fields,
        "width": Field("hidden_size", 2048),
        "layers": Field("num_layers", 24),
        "heads": Field("num_heads", 16),
        "mlp_width": Field("intermediate_size", lambda known: 4 * known["width"]),
        "max_positions": Field("max_position_embeddings", 2048),
        "window": Field("window_size", 256),
        "local_layers": Field(
            "attention_types",
            lambda known: tuple(i % 2 == 1 for i in range(known["layers"])),
            decode=_decode,
            encode=_encode,
        ),
        "query_scalar": derived(1.0),
        "attention_bias": derived(False),
    },
    understood={},
    weights={
        **GPT2.weights,
        **rows(
            "transformer.h.{}.",
            ("attention.query", "attn.attention.q_proj.weight", "(heads head_dim) embed"),
            ("attention.key", "attn.attention.k_proj.weight", "(kv_heads head_dim) embed"),
            ("attention.value", "attn.attention.v_proj.weight", "(kv_heads head_dim) embed"),
            ("attention.out", "attn.attention.out_proj.weight", "embed (heads head_dim)"),
            ("attention.out_bias", "attn.attention.out_proj.bias", "norm"),
            ("mlp.up", "mlp.c_fc.weight", "mlp embed"),
            ("mlp.down", "mlp.c_proj.weight", "embed mlp"),
        ),
    },
    ignored=(r"attention\.bias$", r"attention\.masked_bias$"),
)
