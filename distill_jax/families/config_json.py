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
        if family.config is not type(config):
            continue
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
        said = _look_up(published, key)
        if said not in ([], [None]) and said[0] not in values:
            raise ValueError(
                f"{key} must be {' or '.join(map(repr, values))} for {family.architecture}; "
                f"got {said[0]!r}, which is not computed here."
            )
    return family.config(**_read_fields(family, published))


def write_config(
    family: Family, config: ModelConfig, published: Mapping[str, Any]
) -> dict[str, Any]:
    """A `config.json` that says `config`: all of `published`, but for the fields that differ."""
    written = dict(published) | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    written.pop("torch_dtype", None)  # the older spelling of dtype
    before = _read_fields(family, published)
    for name, field in family.fields.items():
        value = getattr(config, name)
        if not field.key or (published and before[name] == value):
            continue
        said = field.encode(value, vars(config))
        if said is not None or field.nullable:
            _put(written, field.key, said)
        for key in field.older:
            written.pop(key, None)
    return written


def _read_fields(family: Family, published: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, field in family.fields.items():
        said = [value for key in (field.key, *field.older) for value in _look_up(published, key)]
        if not field.nullable:
            said = [value for value in said if value is not None]
        if said:
            known[name] = None if said[0] is None else field.decode(said[0], known)
        else:
            known[name] = field.default(known) if callable(field.default) else field.default
    return known


def _look_up(published: Mapping[str, Any], key: str) -> list[Any]:
    """The value of a key, dots before the keys of inner objects; [] if there is none."""
    outer, _, inner = key.partition(".")
    if outer not in published:
        return []
    value = published[outer]
    if not inner:
        return [value]
    return _look_up(value, inner) if isinstance(value, Mapping) else []


def _put(target: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value of a key like those of `_look_up`; an object is added to what is there."""
    outer, _, inner = key.partition(".")
    if inner:
        target[outer] = dict(target.get(outer) or {})
        _put(target[outer], inner, value)
    elif isinstance(value, Mapping):
        target[outer] = {**(target.get(outer) or {}), **value}
    else:
        target[outer] = value
