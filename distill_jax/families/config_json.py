"""A published `config.json` to `ModelConfig` and back, through a family's table."""

from collections.abc import Mapping
from typing import Any

from distill_jax.families import FAMILIES
from distill_jax.families.table import Family
from distill_jax.student.model import ModelConfig


def find_family(published: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
      ValueError: it names none that we know; the message lists those.
    """
    by_type = {family.model_type: family for family in FAMILIES.values()}
    named, kind = published.get("architectures"), published.get("model_type")
    family = FAMILIES.get(named[0]) if named else by_type.get(kind or "")
    if family is None:
        raise ValueError(
            f"architecture {named[0] if named else kind} is not known; "
            f"known: {', '.join(FAMILIES)}."
        )
    return family


def find_family_for(config: ModelConfig) -> Family:
    """The first family that can hold a model of our own.

    Raises:
      ValueError: none can.
    """
    for family in FAMILIES.values():
        if read_config(family, write_config(family, config, {})) == config:
            return family
    raise ValueError(f"no family of {', '.join(FAMILIES)} can hold {config}.")


def read_config(family: Family, published: Mapping[str, Any]) -> ModelConfig:
    """Reads what a published model is made of.

    Raises:
      ValueError: a key has a value that we do not compute.

    Example:
      >>> read_config(FAMILIES["GPT2LMHeadModel"], {"n_embd": 1024, "n_head": 16}).head_dim
      64
    """
    for key, values in family.understood.items():
        value = _look_up(published, key)
        if value is not None and value not in values:
            raise ValueError(
                f"{key} must be {' or '.join(map(repr, values))} for {family.architecture}; "
                f"got {value!r}, which is not computed here."
            )
    return ModelConfig(**_read_fields(family, published))


def write_config(
    family: Family, config: ModelConfig, published: Mapping[str, Any]
) -> dict[str, Any]:
    """A `config.json` that says `config`: all of `published`, but for the fields that differ."""
    written = dict(published) | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": "float32",
    }
    written.pop("torch_dtype", None)  # the older spelling of dtype
    before = _read_fields(family, published)
    for name, field in family.fields.items():
        value = getattr(config, name)
        if not field.key or (published and before[name] == value):
            continue
        outer, _, inner = field.key.partition(".")
        written[outer] = {**(written.get(outer) or {}), inner: value} if inner else value
        if field.older:
            written.pop(field.older, None)
    return written


def _read_fields(family: Family, published: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, field in family.fields.items():
        places = [key for key in (field.key, field.older) if key]
        said = [value for key in places if (value := _look_up(published, key)) is not None]
        default = field.default(known) if callable(field.default) else field.default
        known[name] = said[0] if said else default
    return known


def _look_up(published: Mapping[str, Any], key: str) -> Any:
    """The value of a key, a dot before a key of an inner object; None if absent or null."""
    outer, _, inner = key.partition(".")
    value = published.get(outer)
    if not inner:
        return value
    return value.get(inner) if isinstance(value, Mapping) else None
