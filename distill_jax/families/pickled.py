"""Weights as old PyTorch checkpoints keep them: the only file of the package that needs torch."""

import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from distill_jax.families.stored import FLOATS, Stored, WeightsError

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def read_pickled(file: Path) -> dict[str, Stored]:
    """The arrays of a `pytorch_model.bin`; nothing but numbers is ever unpickled.

    A file older than PyTorch 1.6 is no zip archive and can't be mapped: the host holds all of it.

    Raises:
      WeightsError: the file is cut short or corrupt, or holds something else than arrays by name.
    """
    mapped = zipfile.is_zipfile(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise WeightsError(f"{file} can't be read as weights alone: {reason}.") from None
    if not isinstance(loaded, Mapping) or not all(map(torch.is_tensor, loaded.values())):
        raise WeightsError(f"{file} holds something else than arrays by name.")
    return {
        name: Stored(_KINDS.get(x.dtype, str(x.dtype)), tuple(x.shape), partial(_map, x))
        for name, x in loaded.items()
    }


def _map(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, which torch keeps mapped."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such numbers of its own
        return tensor.view(torch.int16).numpy().view(FLOATS["BF16"])
    return tensor.detach().numpy()
