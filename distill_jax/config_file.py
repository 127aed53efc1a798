"""Config files: YAML read into the knobs, and written back.

A file may name another with `extends:`; its own keys win. `key.sub=value` on the command line
wins over both.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from distill_jax.config import Config, ConfigError, knobs, parse_config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file.

    Args:
      path: A YAML file. `extends:` in it names another, relative to it.
      overrides: `key.sub=value`, the value in YAML; they win over the file.

    Raises:
      ConfigError: the file can't be read, a key is unknown, or a value is not allowed.
    """
    return make_config(_read_yaml(Path(path), seen=()), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The config with some knobs set anew.

    Raises:
      ConfigError: as `load_config`.

    Example:
      >>> values = {"folder": "runs/a", "task": {"name": "svamp"}, "student": {"model": "m"}}
      >>> override(parse_config(values), ["rounds.max=2"]).rounds.max
      2
    """
    return make_config(config.model_dump(mode="json"), overrides)


def make_config(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config that nested `values` describe once `overrides` have been set in them.

    Raises:
      ConfigError: as `load_config`.
    """
    for setting in overrides:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is written key.sub=value; got {setting!r}.")
        _set(values, key.split("."), _parse_value(setting, text))
    return parse_config(values)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: Config, new: Config) -> list[str]:
    """A line `key: old -> new` for every knob whose value differs."""
    values = (
        (k, [reduce(getattr, k.split("."), config) for config in (old, new)]) for k in knobs()
    )
    return [f"{name}: {a!r} -> {b!r}" for name, (a, b) in values if a != b]


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values over those of the file that it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"extends: {path} extends itself.")
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config {path} can't be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must hold keys and values; got {values!r}.")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _merge(_read_yaml(path.parent / str(parent), (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        both[key] = value
    return both


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = dict(inner) if isinstance(inner, dict) else {}
        values = values[key]
    values[keys[-1]] = value


def _parse_value(setting: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of {setting!r} is not YAML.") from None
