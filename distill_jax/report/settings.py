"""What a run was set to and made with, fit to be shown to others."""

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any
from urllib.parse import urlsplit

from distill_jax.config import Config, StudentConfig, TaskConfig, knobs

NO_DEFAULT = ("folder", "task.name", "student.model")
_PAPER: Mapping[str, Any] = {"reflection.weight": 0.5, "task.dev_fraction": 0.0}
"""The paper's values of the knobs whose defaults are others."""


def beyond_paper(config: Config) -> list[tuple[str, str, str]]:
    """Knobs that differ from the paper's value, or the default where it has none.

    Each as name, that value, this run's.

    Example:
      >>> from distill_jax.config import parse_config
      >>> task, student = {"name": "svamp"}, {"model": "gpt2"}
      >>> config = parse_config({"folder": "a", "task": task, "student": student, "seed": 1})
      >>> for row in beyond_paper(config):
      ...     print(*row)
      seed 42 1
      task.dev_fraction 0.0 0.1
      reflection.weight 0.5 0.1
    """
    # Built unchecked: the defaults need not make a run that works for this task.
    defaults = Config.model_construct(
        folder=config.folder,
        task=TaskConfig(name=config.task.name),
        student=StudentConfig(model=config.student.model),
    )
    values = (
        (name, _PAPER.get(name, _get(defaults, name)), _get(config, name)) for name in knobs()
    )
    return [(name, _show(old), _show(new)) for name, old, new in values if old != new]


def given(config: Config) -> list[tuple[str, str]]:
    """The knobs that have no default, and their values."""
    return [(name, _show(_get(config, name))) for name in NO_DEFAULT]


def flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines: dotted name, value.

    Example:
      >>> list(flatten({"versions": {"jax": "0.10.2"}, "seed": 42}))
      [('versions.jax', '0.10.2'), ('seed', '42')]
    """
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _show(value)


def _get(config: Config, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def _show(value: Any) -> str:
    """A value in words; an address loses whatever may be a password."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_show, value))
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return str(value)
