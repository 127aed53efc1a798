"""Published arrays as they lie in a file: mapped only while something is copied out of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""By the names that safetensors uses; arrays of other kinds are not read."""


class WeightsError(ValueError):
    """A model that can't be read or written. The message names the file and all that is wrong."""


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Attributes:
      kind: What its numbers are, a key of `FLOATS` or any other name.
      shape: As published.
      map: Gives it as numpy sees it in the file. Nothing is read until something is copied out
        of it, and what was read leaves memory with the result.
    """

    kind: str
    shape: tuple[int, ...]
    map: Callable[[], np.ndarray]


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The arrays that the header of a file lists.

    Raises:
      WeightsError: the file is cut short or corrupt.
    """
    try:
        with safe_open(file, "np"):
            pass  # the library has checked that the header is sound and fits the file
    except SafetensorError as error:
        raise WeightsError(f"{file} is cut short or corrupt: {error}.") from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        kind, shape = entry["dtype"], tuple(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        arrays[name] = Stored(kind, shape, partial(_map, file, kind, offset, shape))
    return arrays


def _map(file: Path, kind: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(file, FLOATS[kind], "r", offset, shape)
