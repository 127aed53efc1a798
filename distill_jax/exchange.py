"""Students in and out: Hugging Face directories to checkpoints, and rounds to directories."""

from pathlib import Path
from typing import Any

from distill_jax import weights
from distill_jax.checkpoint import save_params
from distill_jax.config import ConfigError, load_config
from distill_jax.run_folder import read_json
from distill_jax.school import find_base, open_student
from distill_jax.student.model import abstract_params, logical_axes
from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings


def import_model(name: str, to: Path) -> dict[str, Any]:
    """Reads a published model and keeps its weights as a float32 checkpoint.

    Args:
      name: A Hugging Face directory or hub id.
      to: The checkpoint's folder, made here.

    Returns:
      `model` and `checkpoint`.

    Raises:
      ValueError: `to` exists, or the model can't be read; the message lists every weight that is
        missing, unexpected or misshapen.
    """
    if to.exists():
        raise ConfigError(f"{to} exists already; name a new folder.")
    base = weights.find_model(name)
    model = weights.read_model_config(base)
    shapes = abstract_params(model)
    layout = shardings(make_mesh(1, -1, 1), logical_axes(model), shapes, TRAIN_RULES)
    params = weights.load_params(base, model, layout)
    save_params(to, params)
    return {"model": str(base), "checkpoint": str(to)}


def export_round(folder: Path, to: Path, *, round_index: int = -1) -> dict[str, Any]:
    """Writes the student after a round as a Hugging Face directory.

    Args:
      folder: The run.
      to: The directory, made here.
      round_index: Which round; 0 is the untrained student, -1 the one that the run chose.

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
    student = open_student(config, find_base(config, folder), folder)
    params = student.weights.get(round_index)
    weights.save_model(to, student.model, params, student.tokenizer, source=student.base)
    return {
        "run": str(folder),
        "round": round_index,
        "directory": str(to),
    }
