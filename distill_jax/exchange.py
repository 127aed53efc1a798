"""Students in and out: published models to student directories, and rounds to directories."""

from pathlib import Path
from typing import Any

from distill_jax import weights
from distill_jax.adapters import save_adapters
from distill_jax.config import ConfigError
from distill_jax.config_file import load_config
from distill_jax.model_card import make_card
from distill_jax.run_folder import read_json
from distill_jax.school import Weights, find_base, open_weights
from distill_jax.student.model import abstract_params, logical_axes
from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
from distill_jax.tokenizer import load_tokenizer


def import_model(
    name: str, to: Path, *, pickled: bool = False, dtype: weights.Written = "float32"
) -> dict[str, Any]:
    """Reads a published model, checks every weight, and writes it as a student directory.

    Any published directory or hub id with safetensors can be a student as it is; this is for those
    that have only `pytorch_model.bin`, and to have a copy that is known to be whole.

    Args:
      name: A Hugging Face directory or hub id.
      to: The directory, made here; `student.model` may name it.
      pickled: Reads `pytorch_model.bin` instead of safetensors. Needs torch, which unpickles
        nothing but numbers.
      dtype: Of the weights written.

    Returns:
      `model` and `directory`.

    Raises:
      ValueError: `to` holds something, or the model can't be read; the message lists every weight
        that is missing, unexpected or misshapen.
    """
    weights.check_new(to)
    base = weights.find_model(name, pickled=pickled)
    model = weights.read_model_config(base, pickled=pickled)
    tokenizer = load_tokenizer(str(base))
    layout = shardings(
        make_mesh(1, -1, 1), logical_axes(model), abstract_params(model), TRAIN_RULES
    )
    params = weights.load_params(base, model, layout, pickled=pickled)
    weights.save_model(to, model, params, tokenizer, source=base, dtype=dtype)
    return {"model": str(base), "directory": str(to)}


def _save_adapters(to: Path, student: Weights, round_index: int, *, base: Path) -> None:
    """Writes the adapters of a round."""
    if student.model.lora is None:
        raise ConfigError("the run's student.lora is null; export it without --adapters.")
    save_adapters(to, student.model, student.get_adapters(round_index), base=base)


def export_round(
    folder: Path,
    to: Path,
    *,
    round_index: int = -1,
    dtype: weights.Written = "float32",
    adapters: bool = False,
) -> dict[str, Any]:
    """Writes the student after a round as a Hugging Face directory with a model card.

    The devices here decide how the weights lie, not those that trained them.

    Args:
      folder: The run.
      to: The directory, made here.
      round_index: Which round; 0 is the untrained student, -1 the one that the run chose.
      dtype: Of the weights written; adapters are float32.
      adapters: Writes the adapters alone, in peft's layout, instead of merged weights.

    Returns:
      `run`, `round` and `directory`.

    Raises:
      ValueError: the run has no such round or has not chosen one yet, or `to` holds something.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds no run: a run folder has a config.yaml.")
    config = load_config(folder / "config.yaml")
    if round_index < 0:
        result = read_json(folder / "result.json")
        if not result:
            raise ConfigError(f"{folder} is not finished; name a round with --round.")
        round_index = result["chosen_round"]
    weights.check_new(to)
    base = find_base(config, folder)
    student = open_weights(config, folder, base, make_mesh(1, -1, 1))
    if adapters:
        _save_adapters(to, student, round_index, base=base)
    else:
        weights.save_model(
            to,
            student.model.plain,
            student.get(round_index),
            load_tokenizer(str(base)),
            source=base,
            dtype=dtype,
            card=make_card(folder, round_index, name=to.name),
        )
    return {
        "run": str(folder),
        "round": round_index,
        "directory": str(to),
    }
