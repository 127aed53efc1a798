"""T5 and Flan-T5: an encoder-decoder with relative positions and scores that are not scaled."""

from distill_jax.families.table import Family, Field, Known, derived, number
from distill_jax.student.architecture import EncoderDecoderConfig

NO_END = 2**20
"""Tokens of a text at most: relative positions go on for ever."""

_GATED = "gated-"


def _read_activation(said: str, known: Known) -> str:
    return "gelu_new" if said == "gated-gelu" else said.removeprefix(_GATED)  # as published


def _write_activation(ours: str, known: Known) -> str:
    if not known["gated_mlp"]:
        return ours
    return "gated-gelu" if ours == "gelu_new" else _GATED + ours


def _layers(stack: str, *attentions: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """Entries of one stack, whose layers have attentions (our name, published name) and an MLP."""
    found = {}
    for index, (ours, theirs) in enumerate(attentions):
        prefix = f"{stack}.block.{{}}.layer.{index}."
        found[f"{stack}.{ours}_norm.scale"] = (prefix + "layer_norm.weight", "norm")
        for matrix, name, heads in (
            ("query", "q", "heads"),
            ("key", "k", "kv_heads"),
            ("value", "v", "kv_heads"),
        ):
            layout = f"({heads} head_dim) embed"
            found[f"{stack}.{ours}.{matrix}"] = (f"{prefix}{theirs}.{name}.weight", layout)
        found[f"{stack}.{ours}.out"] = (f"{prefix}{theirs}.o.weight", "embed (heads head_dim)")
    prefix = f"{stack}.block.{{}}.layer.{len(attentions)}."
    return found | {
        f"{stack}.mlp_norm.scale": (prefix + "layer_norm.weight", "norm"),
        f"{stack}.mlp.gate": (prefix + "DenseReluDense.wi_0.weight", "mlp embed"),
        f"{stack}.mlp.up": (prefix + "DenseReluDense.wi.weight", "mlp embed"),
        f"{stack}.mlp.down": (prefix + "DenseReluDense.wo.weight", "embed mlp"),
    }


def _distances(stack: str) -> tuple[str, str]:
    """Told by the first layer, used by all."""
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return name, "buckets heads"


WEIGHTS = {
    "embedding": ("shared.weight", "vocab embed"),
    "encoder_distances": _distances("encoder"),
    **_layers("encoder", ("attention", "SelfAttention")),
    "encoder_norm.scale": ("encoder.final_layer_norm.weight", "norm"),
    "decoder_distances": _distances("decoder"),
    **_layers("decoder", ("attention", "SelfAttention"), ("cross", "EncDecAttention")),
    "norm.scale": ("decoder.final_layer_norm.weight", "norm"),
    "head": ("lm_head.weight", "vocab embed"),
}

T5 = Family(
    architecture="T5ForConditionalGeneration",
    model_type="t5",
    config=EncoderDecoderConfig,
    fields={
        "vocab_size": Field("vocab_size", 32128),
        "width": Field("d_model", 512),
        "encoder_layers": Field("num_layers", 6),
        "layers": Field("num_decoder_layers", lambda known: known["encoder_layers"]),
        "heads": Field("num_heads", 8),
        "kv_heads": derived(lambda known: known["heads"]),
        "head_dim": Field("d_kv", 64),
        "mlp_width": Field("d_ff", 2048),
        "max_positions": derived(NO_END),
        "norm": derived("rms"),
        "norm_epsilon": number("layer_norm_epsilon", 1e-6),
        "gated_mlp": Field(
            "feed_forward_proj",
            False,
            decode=lambda said, known: said.startswith(_GATED),
            encode=lambda gated, known: _write_activation(known["activation"], known),
        ),
        "activation": Field(
            "feed_forward_proj", "relu", decode=_read_activation, encode=_write_activation
        ),
        "positions": derived("relative"),
        "buckets": Field("relative_attention_num_buckets", 32),
        "max_distance": Field("relative_attention_max_distance", 128),
        "head_scale": Field(
            "scale_decoder_outputs",
            lambda known: known["width"] ** -0.5,
            ("tie_word_embeddings",),  # what says it in older files
            decode=lambda said, known: known["width"] ** -0.5 if said else 1.0,
            encode=lambda ours, known: ours != 1.0,
        ),
        # Never written: this key also decides on the scale, and the files tell whether it is tied.
        "tied_head": Field("tie_word_embeddings", True, encode=lambda ours, known: None),
        "start_id": Field("decoder_start_token_id", 0),
    },
    understood={"is_encoder_decoder": (True,)},
    prefix="",
    weights=WEIGHTS,
    gated={
        f"{stack}.mlp.up": (WEIGHTS[f"{stack}.mlp.gate"][0].replace("wi_0", "wi_1"), "mlp embed")
        for stack in ("encoder", "decoder")
    },
    ignored=(
        r"^(encoder|decoder)\.embed_tokens\.weight$",  # copies of the embedding
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    ),
)
