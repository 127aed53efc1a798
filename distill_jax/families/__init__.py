"""The model families that can be read and written, by the class that a `config.json` names."""

from distill_jax.families.gemma2 import GEMMA2
from distill_jax.families.gemma3 import GEMMA3
from distill_jax.families.gpt2 import GPT2
from distill_jax.families.gpt_neo import GPT_NEO
from distill_jax.families.gpt_neox import GPT_NEOX
from distill_jax.families.gptj import GPTJ
from distill_jax.families.llama import LLAMA
from distill_jax.families.mistral import MISTRAL
from distill_jax.families.opt import OPT
from distill_jax.families.qwen2 import QWEN2
from distill_jax.families.qwen3 import QWEN3
from distill_jax.families.t5 import T5
from distill_jax.families.table import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        LLAMA,
        GPT2,
        GPT_NEO,
        GPTJ,
        OPT,
        GPT_NEOX,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        MISTRAL,
        T5,
    )
}
"""In the order in which a home for a model of our own is looked for."""
