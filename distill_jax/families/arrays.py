"""Published arrays checked against a table, read onto devices, and written."""

import functools
import math
import mmap
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from distill_jax.families.files import INDEX, SINGLE, write_json
from distill_jax.families.layout import Placement, flatten
from distill_jax.families.stored import FLOATS, Stored
from distill_jax.families.table import Family
from distill_jax.student.model import Params

FILE_BYTES = 4 * 10**9
"""A file is closed before it would grow beyond this."""

STRETCH_BYTES = 2**23
"""No more of a file is mapped at a time."""


def find_misfits(
    placements: Sequence[Placement], family: Family, arrays: Mapping[str, Stored], *, tied: bool
) -> Iterator[str]:
    """Yields a line for every array that is missing, misshapen or not known."""
    expected = {name: place.shape for place in placements for name in place.names}
    for name, shape in expected.items():
        if name not in arrays:
            yield f"missing: {name} {list(shape)}"
        elif arrays[name].shape != shape:
            yield f"misshapen: {name} is {list(arrays[name].shape)}, expected {list(shape)}"
        elif arrays[name].kind not in FLOATS:
            yield f"not a float: {name} holds {arrays[name].kind}"
    copies = {family.weights["head"][0]} if tied else set()
    for name in sorted(arrays.keys() - expected.keys() - copies):
        if not any(re.search(pattern, name) for pattern in family.ignored):
            yield f"unexpected: {name} {list(arrays[name].shape)}"


def load(
    place: Placement, shape: tuple[int, ...], arrays: Mapping[str, Stored], sharding: NamedSharding
) -> jax.Array:
    """Reads one of our weights onto its devices, as float32, one published array after the other.

    Every process reads what its own devices keep, and that once. The host holds one published
    array at a time.

    Args:
      place: Where it stands.
      shape: Ours, layers and padded vocabulary included; rows that pad are zero.
      arrays: From `find_arrays`, without misfits.
      sharding: How it lies on the devices; layers are not spread.
    """
    if not place.stacked:
        return _read(place, shape, arrays[place.names[0]], sharding)
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(shape, jnp.float32, device=sharding)
    for layer, name in enumerate(place.names):
        stack = _set_layer(stack, _read(place, shape[1:], arrays[name], one), layer)
        stack.block_until_ready()  # the host lets go of a layer before it reads the next
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, weight: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, weight, layer, axis=0)


def _read(
    place: Placement, shape: tuple[int, ...], stored: Stored, sharding: NamedSharding
) -> jax.Array:
    """Reads a weight of one layer, each part once however many devices keep it."""

    @functools.cache
    def read_part(*ranges: tuple[int, int]) -> np.ndarray:
        part = _zeros([stop - start for start, stop in ranges])
        box = {
            axis: (start, min(stop, place.sizes[axis]))
            for axis, (start, stop) in zip(place.axes, ranges, strict=True)
        }
        if all(start < stop for start, stop in box.values()):  # not only padded vocabulary
            place.read(stored.map, box, part, stretch_bytes=STRETCH_BYTES)
        return part

    def read_slices(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read_part(*(s.indices(size)[:2] for s, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, read_slices)


def _zeros(shape: Sequence[int]) -> np.ndarray:
    """A float32 array on pages of its own.

    They go back to the system at once, where a heap would keep them, and JAX's CPU devices use
    memory that is aligned like this as it is instead of copying it.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), np.float32).reshape(shape)


def write_arrays(
    directory: Path,
    placements: Sequence[Placement],
    params: Params,
    *,
    dtype: np.dtype,
    writes: bool,
) -> None:
    """Writes all weights under their published names, in files of bounded size.

    Every process calls this, since weights may be spread over several; one of them `writes`.
    """
    sizes = {
        name: dtype.itemsize * math.prod(place.shape)
        for place in placements
        for name in place.names
    }
    files = _plan_files(sizes)
    if len(set(files.values())) > 1 and writes:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(directory / INDEX, index)
    left = Counter(files.values())
    pending: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, array in _published_arrays(placements, params, dtype):
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
    placements: Sequence[Placement], params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every published array; weights that share one are gathered together."""
    flat = flatten(params)
    sharing: dict[tuple[str, ...], list[Placement]] = {}
    for place in placements:
        sharing.setdefault(place.names, []).append(place)
    for names, places in sharing.items():
        weights = [to_host(flat[place.path]) for place in places]
        for layer, name in enumerate(names):
            array = np.empty(places[0].shape, dtype)
            for place, weight in zip(places, weights, strict=True):
                place.write(array, weight[layer] if place.stacked else weight)
            yield name, array


def to_host(weight: jax.Array) -> np.ndarray:
    """A weight as one array, wherever its parts lie; every process calls this."""
    if weight.is_fully_addressable:
        return np.asarray(weight)
    return np.asarray(multihost_utils.process_allgather(weight, tiled=True))
