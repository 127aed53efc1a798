"""The model families that can be read and written, by the class that a `config.json` names."""

from distill_jax.families.gpt2 import GPT2
from distill_jax.families.llama import LLAMA
from distill_jax.families.table import Family

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, GPT2)}
