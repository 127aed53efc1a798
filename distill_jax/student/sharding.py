"""The mesh, and the tables that lay logical axes of weights on its axes."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

BATCH = P(("data", "fsdp"))
"""How rows are spread: over every device that does not share its weights' heads."""

EXAM_RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "positions": None,
    "embedding": None,
    "norm": None,
    "rank": None,
    "buckets": None,
}
"""Weights whole on every device but for the tensor axis: decoding never gathers them."""

TRAIN_RULES: Mapping[str, str | None] = {**EXAM_RULES, "embed": "fsdp"}
"""The width of every matrix is spread over `fsdp`, so weights and moments are stored once."""


def make_mesh(data: int, fsdp: int, tensor: int, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices as a grid with axes `data`, `fsdp` and `tensor`.

    Devices of several slices, which only a slow network joins, are told apart along `data`: all of
    `fsdp` and `tensor` stays within a slice.

    Args:
      data: Copies of the weights.
      fsdp: Devices that the weights of one copy are spread over, gathered when used.
      tensor: Devices that share one matrix product. At most one of the three is -1: all devices
        that the others leave.
      devices: To be arranged; all there are if left out.

    Returns:
      A mesh with automatic axes: the compiler places what the rules leave open.

    Raises:
      ValueError: the grid doesn't fit the devices or their slices, or leaves some unused on several
        hosts.

    Example:
      >>> dict(make_mesh(1, -1, 1).shape)["fsdp"] == jax.device_count()
      True
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    given = [size for size in sizes.values() if size != -1]
    known = math.prod(given)
    if len(given) < 2 or min(given) < 1:
        raise ValueError(f"mesh axes are 1 or more, one of them may be -1; got {asked}.")
    sizes = {name: available // known if size == -1 else size for name, size in sizes.items()}
    total = math.prod(sizes.values())
    if not 0 < total <= available or (-1 in (data, fsdp, tensor) and total != available):
        raise ValueError(
            f"mesh {asked} does not fit the {available} devices here; "
            "change mesh.data, mesh.fsdp or mesh.tensor."
        )
    if total < available and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            f"mesh {asked} uses {total} of {available} devices; on several hosts it must use all."
        )
    return Mesh(_arrange(devices[:total], *sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def count_slices(devices: Sequence[Any]) -> int:
    """How many groups of devices there are that only a slow network joins."""
    return len({_slice(device) for device in devices})


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _arrange(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """A grid in which neighbours along the last axes are joined best."""
    slices = count_slices(devices)
    if data % slices:
        raise ValueError(
            f"mesh.data must be a multiple of the {slices} slices, as only this axis may cross the "
            f"network between them; got {data}."
        )
    parts = [
        [device for device in devices if _slice(device) == index]
        for index in sorted({_slice(device) for device in devices})
    ]
    shape = (data // slices, fsdp, tensor)
    arrange = partial(mesh_utils.create_device_mesh, shape, allow_split_physical_axes=True)
    return np.concatenate([arrange(part) for part in parts])


def shardings(
    mesh: Mesh | AbstractMesh, axes: Any, shapes: Any, rules: Mapping[str, str | None]
) -> Any:
    """Lays every weight on the mesh.

    A dim that its mesh axis does not divide is kept whole on every device.

    Args:
      mesh: From `make_mesh`, or one without devices.
      axes: A tree whose leaves are tuples with one logical axis name per dim.
      shapes: The same tree with anything that has a `shape` as leaves.
      rules: Mesh axis of each logical axis; None keeps it whole.

    Returns:
      The same tree with a `NamedSharding` for each leaf.

    Raises:
      ValueError: a logical axis is not in `rules`, or two of one weight share a mesh axis.

    Example:
      >>> weight = jax.ShapeDtypeStruct((8, 6), "float32")
      >>> tuple(shardings(make_mesh(1, 1, 1), ("embed", "mlp"), weight, TRAIN_RULES).spec)
      ('fsdp', 'tensor')
    """

    def lay(names: tuple[str, ...], leaf: Any) -> NamedSharding:
        unknown = [name for name in names if name not in rules]
        if unknown:
            raise ValueError(f"axis {unknown[0]!r} is in no rule; known: {', '.join(rules)}.")
        placed = [rules[name] for name in names]
        used = [axis for axis in placed if axis is not None]
        if len(set(used)) != len(used):
            raise ValueError(f"the rules lay two axes of {names} on one mesh axis: {placed}.")
        assert len(names) == len(leaf.shape), f"{names} does not name the dims of {leaf.shape}"
        fits = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(placed, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree.map(lay, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
