"""What a family's table says: where its config keeps each field, and its names and layouts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_jax.student.architecture import ModelConfig

Known = Mapping[str, Any]
"""The fields of `ModelConfig` that are listed before the one being read."""


def _same(value: Any, known: Known) -> Any:
    return value


@dataclass(frozen=True)
class Field:
    """Where a published config keeps one field of `ModelConfig`.

    Attributes:
      key: Its key, with dots before the keys of inner objects; "" if no config says it.
      default: What an absent key means: our value, or a function of the fields listed before it.
      older: Keys that older files use.
      nullable: Whether null is a value of its own; otherwise it means the same as an absent key.
      decode: Our value from the published one.
      encode: And back.
    """

    key: str
    default: Any
    older: tuple[str, ...] = ()
    nullable: bool = False
    decode: Callable[[Any, Known], Any] = _same
    encode: Callable[[Any, Known], Any] = _same


@dataclass(frozen=True)
class Family:
    """One model family as published on the Hugging Face hub.

    A weight's layout names the dims of the published array by our logical axes. Dims that are one
    in the file stand in brackets, slowest first: `(heads head_dim) embed`. Where several of our
    weights share an array, `0/3` is the first of three equal parts. Our own order of dims is
    that of the declaration in `student/blocks.py`, so a layout alone says what to transpose.

    Attributes:
      architecture: The class that `config.json` names.
      model_type: What `config.json` calls the family.
      fields: Where each field of `ModelConfig` stands.
      understood: Keys that change the model, and the values that we compute; others are refused.
      prefix: What some files leave out in front of the names.
      weights: Our path to (published name, layout); `{}` in a name is the layer.
      ignored: Patterns of arrays that hold nothing learnt.
      config: What `fields` make.
      gated: Entries of `weights` that are others where the MLP is gated.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Field]
    understood: Mapping[str, tuple[Any, ...]]
    prefix: str
    weights: Mapping[str, tuple[str, str]]
    ignored: tuple[str, ...] = ()
    config: type[ModelConfig] = ModelConfig
    gated: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def derived(value: Callable[[Known], Any] | Any) -> Field:
    """A field that no config of the family says: a value, or a function of earlier fields."""
    return Field("", value)


def number(key: str, default: Any, older: tuple[str, ...] = (), *, nullable: bool = False) -> Field:
    """A field that is a float, though some files write it without a point."""
    return Field(key, default, older, nullable, decode=lambda said, known: float(said))


def rows(prefix: str, *weights: tuple[str, str, str]) -> dict[str, tuple[str, str]]:
    """Entries of `Family.weights` for (our path, published name, layout) in every block.

    Example:
      >>> rows("h.{}.", ("mlp.up", "mlp.c_fc.weight", "embed mlp"))
      {'blocks.mlp.up': ('h.{}.mlp.c_fc.weight', 'embed mlp')}
    """
    return {f"blocks.{ours}": (prefix + name, layout) for ours, name, layout in weights}
