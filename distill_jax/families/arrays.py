"""The published arrays of a directory: opened, checked against a table, read, and written."""

import contextlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill_jax.families.layout import Placement, flatten
from distill_jax.families.table import Family
from distill_jax.student.model import Params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
FILE_BYTES = 4 * 10**9
"""A file is closed before it would grow beyond this."""


class WeightsError(ValueError):
    """A model that can't be read or written. The message names the file and all that is wrong."""


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


def open_arrays(directory: Path, family: Family, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Opens every published array without reading it.

    Args:
      directory: Holds one file of weights, or an index and the files that it names.
      family: Whose prefix is put back where the files leave it out.
      stack: Closes the files.

    Returns:
      By full name: what gives shape, dtype and any box of the array.

    Raises:
      WeightsError: a file is absent, cut short or corrupt.
    """
    known = {published.format(0) for published, _ in family.weights.values()}

    def full(name: str) -> str:
        longer = family.prefix + name
        return longer if re.sub(r"\.\d+\.", ".0.", longer) in known else name

    if (directory / INDEX).is_file():
        files = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    else:
        files = [SINGLE]
    sources = {}
    for file in (directory / name for name in files):
        if not file.is_file():
            raise WeightsError(f"{directory} holds no {file.name}; weights are read from it.")
        try:
            opened = stack.enter_context(safe_open(file, "np"))
        except SafetensorError as error:
            raise WeightsError(f"{file} is cut short or corrupt: {error}.") from None
        names = opened.keys()
        sources |= {full(name): opened.get_slice(name) for name in names}
    return sources


def find_misfits(
    placements: Sequence[Placement], family: Family, sources: Mapping[str, Any], *, tied: bool
) -> Iterator[str]:
    """Yields a line for every array that is missing, misshapen or not known."""
    expected = {name: place.shape for place in placements for name in place.names}
    for name, shape in expected.items():
        if name not in sources:
            yield f"missing: {name} {list(shape)}"
        elif tuple(sources[name].get_shape()) != shape:
            found = sources[name].get_shape()
            yield f"misshapen: {name} is {found}, expected {list(shape)}"
        elif sources[name].get_dtype() not in FLOATS:
            yield f"not a float: {name} holds {sources[name].get_dtype()}"
    copies = {family.weights["head"][0]} if tied else set()
    for name in sorted(sources.keys() - expected.keys() - copies):
        if not any(re.search(pattern, name) for pattern in family.ignored):
            yield f"unexpected: {name} {sources[name].get_shape()}"


def load(
    place: Placement, shape: tuple[int, ...], sources: Mapping[str, Any], sharding: Sharding
) -> jax.Array:
    """Reads one of our weights, each device's part on its own, as float32.

    Args:
      place: Where it stands.
      shape: Ours, layers and padded vocabulary included; rows that pad are zero.
      sources: From `open_arrays`.
      sharding: How it lies on the devices.
    """

    def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        part = np.zeros([stop - start for start, stop in ranges], np.float32)
        names = place.names[slice(*ranges[0])] if place.stacked else place.names
        box = {
            axis: (start, min(stop, place.sizes[axis]))
            for axis, (start, stop) in zip(place.axes, ranges[place.stacked :], strict=True)
        }
        if any(start >= stop for start, stop in box.values()):
            return part  # nothing but rows that pad the vocabulary
        for view, name in zip(part if place.stacked else [part], names, strict=True):
            piece = place.read(sources[name], box)
            view[tuple(slice(size) for size in piece.shape)] = piece
        return part

    return jax.make_array_from_callback(shape, sharding, read_part)


def write_arrays(
    directory: Path, placements: Sequence[Placement], params: Params, *, writes: bool
) -> None:
    """Writes all weights under their published names, as float32, in files of bounded size.

    Every process calls this, since weights may be spread over several; one of them `writes`.
    """
    sizes = {name: 4 * math.prod(place.shape) for place in placements for name in place.names}
    files = _plan_files(sizes)
    if len(set(files.values())) > 1 and writes:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(directory / INDEX, index)
    left = Counter(files.values())
    pending: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, array in _published_arrays(placements, params):
        file = files[name]
        pending[file][name] = array
        if len(pending[file]) == left[file]:
            arrays = pending.pop(file)
            if writes:
                save_file(arrays, directory / file, metadata={"format": "pt"})


def _plan_files(sizes: Mapping[str, int]) -> dict[str, str]:
    """Which file holds each array: in order, a new one before the last would grow too large."""
    numbers, count, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_BYTES:
            count, filled = count + 1, 0
        numbers[name], filled = count, filled + size
    if count == 1:
        return dict.fromkeys(sizes, SINGLE)
    return {name: f"model-{i:05}-of-{count:05}.safetensors" for name, i in numbers.items()}


def _published_arrays(
    placements: Sequence[Placement], params: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every published array; weights that share one are gathered together."""
    flat = flatten(params)
    sharing: dict[tuple[str, ...], list[Placement]] = {}
    for place in placements:
        sharing.setdefault(place.names, []).append(place)
    for names, places in sharing.items():
        weights = [_to_host(flat[place.path]) for place in places]
        for layer, name in enumerate(names):
            array = np.empty(places[0].shape, np.float32)
            for place, weight in zip(places, weights, strict=True):
                place.write(array, weight[layer] if place.stacked else weight)
            yield name, array


def _to_host(weight: jax.Array) -> np.ndarray:
    if weight.is_fully_addressable:
        return np.asarray(weight)
    return np.asarray(multihost_utils.process_allgather(weight, tiled=True))
