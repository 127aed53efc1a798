"""Which grid of devices a run uses, and why."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from distill_jax.chips import find_chip
from distill_jax.config import Config, ConfigError, MeshConfig
from distill_jax.student import lora
from distill_jax.student.model import ModelConfig, abstract_params
from distill_jax.student.sharding import count_slices, make_mesh

Axes = tuple[int, int, int]
"""Devices along `data`, `fsdp` and `tensor`."""

SHARE = 0.5
"""Of a device's memory that weights, moments and gradients may take; activations get the rest."""

WEIGHT, TRAINED = 4, 12
"""Bytes of a weight, and those of its two moments and its gradient where it is trained."""


@dataclass(frozen=True)
class Layout:
    """A grid, and a line that says why it is this one."""

    axes: Axes
    reason: str

    def __str__(self) -> str:
        names = ("data", "fsdp", "tensor")
        sizes = " x ".join(f"{name}={size}" for name, size in zip(names, self.axes, strict=True))
        return f"{sizes}: {self.reason}"


def open_mesh(
    config: Config, model: ModelConfig, devices: Sequence[Any] | None = None
) -> tuple[Mesh, Layout]:
    """The mesh of a run on these devices, or on all there are.

    Raises:
      ConfigError: no grid as asked fits the devices.
    """
    devices = jax.devices() if devices is None else devices
    chip = find_chip(devices[0].device_kind)
    layout = choose_layout(
        config.mesh,
        model,
        rows=config.train.microbatch_size,
        devices=len(devices),
        slices=count_slices(devices),
        memory=chip.memory if chip else None,
    )
    return make_mesh(*layout.axes, devices=devices), layout


def choose_layout(
    asked: MeshConfig,
    model: ModelConfig,
    *,
    rows: int,
    devices: int,
    slices: int = 1,
    memory: float | None,
) -> Layout:
    """The grid for a student on so many devices.

    Where several do, every device computes on rows if there are enough; weights are spread over no
    more devices than half of their memory needs, and over all where nobody knows it; and the rest
    are copies, whose gradients are added up once a step. Only copies lie on different slices.

    Args:
      asked: Sizes that are set; -1 is chosen here.
      model: The student.
      rows: Computed at a time, over all devices.
      devices: In all.
      slices: Groups of them that a slow network joins.
      memory: Bytes of a device; None where nobody knows.

    Raises:
      ConfigError: no grid as asked fits the devices.
    """
    wanted = (asked.data, asked.fsdp, asked.tensor)
    if -1 not in wanted:
        return Layout(wanted, "as the config says.")
    found = list(_grids(wanted, devices, slices))
    if not found:
        sizes = " x ".join(f"{name}={size}" for name, size in asked.model_dump().items())
        groups = f" in {slices} slices, which data has to count" if slices > 1 else ""
        raise ConfigError(
            f"mesh {sizes} does not fit {devices} devices{groups}; leave axes at -1, or "
            f"set sizes that divide {devices}."
        )
    num_bytes = state_bytes(model)

    def cost(axes: Axes) -> tuple[float | int, ...]:
        data, fsdp, tensor = axes
        uneven = tensor > 1 and bool(model.heads % tensor or model.mlp_width % tensor)
        uneven += bool(model.width % fsdp)
        slow = -(-rows // (data * fsdp)) / tensor  # rows that a device computes, in effect
        if memory is None:
            return uneven, slow, tensor, data
        missing = max(num_bytes / (fsdp * tensor) - SHARE * memory, 0.0)
        return missing, uneven, slow, tensor, fsdp

    best = min(found, key=cost)
    return Layout(best, _reason(best, num_bytes, rows, slices, memory))


def _grids(wanted: Axes, devices: int, slices: int) -> Iterator[Axes]:
    """All grids of so many devices with the sizes that are set."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in sizes if wanted[0] == -1 else [wanted[0]]:
        for fsdp in sizes if wanted[1] == -1 else [wanted[1]]:
            tensor, rest = divmod(devices, data * fsdp)
            if not rest and tensor and wanted[2] in (-1, tensor) and data % slices == 0:
                yield data, fsdp, tensor


def _reason(axes: Axes, num_bytes: int, rows: int, slices: int, memory: float | None) -> str:
    data, fsdp, tensor = axes
    parts = [f"weights, moments and gradients take {num_bytes / (fsdp * tensor) / 1e9:,.2f} GB"]
    if memory is not None:
        parts[0] += f" of the {memory / 1e9:,.0f} of a device"
    if slices > 1:
        parts.append(f"only gradients cross the network between {slices} slices")
    shards = data * fsdp
    if rows < shards:
        parts.append(f"a microbatch of {rows} rows leaves {shards - rows} of {shards} parts idle")
    elif tensor > 1:
        parts.append(f"{tensor} devices share each product")
    else:
        parts.append(f"each device computes {-(-rows // shards)} of {rows} rows at a time")
    return "; ".join(parts) + "."


def state_bytes(model: ModelConfig) -> int:
    """Bytes of weights, moments and gradients, all devices together."""
    params = abstract_params(model)
    trained = lora.split(params)[0] if model.lora else params
    return WEIGHT * num_weights(params) + TRAINED * num_weights(trained)


def num_weights(params: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
