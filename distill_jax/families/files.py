"""The files of a Hugging Face directory: its JSON, and the arrays in its files of weights."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_jax.families.stored import Stored, WeightsError, read_safetensors
from distill_jax.families.table import Family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILES, TORCH_FILES = ("*.safetensors", INDEX), ("pytorch_model*.bin", TORCH_INDEX)
"""Patterns of all files that hold weights, of either kind."""

PICKLES_HINT = (
    f"If the model has only {TORCH_SINGLE}, make a directory of safetensors of it with: "
    "distill-jax import MODEL --pickled --to NEW"
)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      WeightsError: the file is absent, or not JSON.
    """
    if not file.is_file():
        raise WeightsError(f"{file.parent} holds no {file.name}; give a Hugging Face directory.")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}.") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def find_arrays(directory: Path, family: Family, *, pickled: bool = False) -> dict[str, Stored]:
    """Finds every published array without reading it.

    Args:
      directory: Holds one file of weights, or an index and the files that it names.
      family: Whose prefix is put back where the files leave it out.
      pickled: Reads `pytorch_model.bin` instead of safetensors; needs torch.

    Returns:
      The arrays by full name.

    Raises:
      WeightsError: a file is absent, cut short or corrupt, or torch is not installed.
    """
    known = {published.format(0) for published, _ in family.weights.values()}

    def full(name: str) -> str:
        longer = family.prefix + name
        return longer if re.sub(r"\.\d+\.", ".0.", longer) in known else name

    read = _torch_reader() if pickled else read_safetensors
    arrays = {}
    for file in _find_files(directory, pickled=pickled):
        arrays |= {full(name): stored for name, stored in read(file).items()}
    return arrays


def _find_files(directory: Path, *, pickled: bool) -> list[Path]:
    """The files of weights, all there."""
    single, index = (TORCH_SINGLE, TORCH_INDEX) if pickled else (SINGLE, INDEX)
    names = [single]
    if (directory / index).is_file():
        places = read_json(directory / index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise WeightsError(f"{directory / index} has no weight_map that names files.")
        names = sorted(set(places.values()))
    for name in names:
        if (directory / name).is_file():
            continue
        raise WeightsError(
            f"{directory} holds no {name}, which weights are read from."
            + (f" {PICKLES_HINT}" if name == SINGLE else "")
        )
    return [directory / name for name in names]


def _torch_reader() -> Callable[[Path], dict[str, Stored]]:
    """What reads PyTorch's pickles; torch is imported here and nowhere else."""
    try:
        from distill_jax.families.pickled import read_pickled
    except ModuleNotFoundError:
        raise WeightsError(
            "PyTorch's pickles are read with torch, which is not installed; "
            "install it with: pip install 'distill_jax[torch]'"
        ) from None
    return read_pickled
