"""Where each of our weights stands in the published arrays, and how its dims are moved."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.families.table import Family
from distill_jax.student.model import ModelConfig, abstract_params, logical_axes

Ranges = Mapping[str, tuple[int, int]]
"""First and one past the last index that is wanted of each of our axes."""


@dataclass(frozen=True)
class Placement:
    """One of our weights in the published arrays.

    Attributes:
      path: Ours, with dots.
      names: Of the published arrays: one, or one for each layer.
      groups: The dims of a published array; several of ours in one stand slowest first.
      sizes: Of all dims, as published: the vocabulary is not padded.
      axes: The order of the dims of our array, without the layers.
      stacked: Whether ours has the layers as a first dim.
    """

    path: str
    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]
    axes: tuple[str, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a published array."""
        return tuple(math.prod(self.sizes[dim] for dim in group) for group in self.groups)

    def view(self, array: np.ndarray, wanted: Ranges) -> np.ndarray:
        """A box of our weight inside a published array, in our order of dims.

        Args:
          array: The published one.
          wanted: The box; an axis that it leaves out is wanted whole.
        """
        dims = [dim for group in self.groups for dim in group]
        apart = array.reshape([self.sizes[dim] for dim in dims])
        box = apart[tuple(slice(*self._range(dim, wanted)) for dim in dims)]
        box = box.squeeze(tuple(i for i, dim in enumerate(dims) if "/" in dim))
        left = [dim for dim in dims if "/" not in dim]
        return box.transpose([left.index(axis) for axis in self.axes])

    def read(
        self,
        map_array: Callable[[], np.ndarray],
        wanted: Ranges,
        target: np.ndarray,
        *,
        stretch_bytes: int,
    ) -> None:
        """Copies a box into the beginning of `target`, in stretches of the file.

        Args:
          map_array: Gives the published array as it lies in the file. Called for every stretch:
            what is mapped counts as memory of the process as soon as it is read.
          wanted: The box, with all axes.
          target: At least as large as the box.
          stretch_bytes: How much of `target` is filled at a time.
        """
        slowest = next(dim for group in self.groups for dim in group if "/" not in dim)
        start, stop = wanted[slowest]
        step = max(1, stretch_bytes * (stop - start) // target.nbytes)
        for first in range(start, stop, step):
            box = {**wanted, slowest: (first, min(first + step, stop))}
            view = self.view(map_array(), box)
            into = {axis: a - wanted[axis][0] for axis, (a, _) in box.items()}
            ends = zip(into.values(), view.shape, strict=True)
            target[tuple(slice(a, a + size) for a, size in ends)] = view

    def write(self, target: np.ndarray, weight: np.ndarray) -> None:
        """Writes our weight of one layer, cut to the published sizes, into its place."""
        self.view(target, {})[...] = weight[tuple(slice(self.sizes[axis]) for axis in self.axes)]

    def _range(self, dim: str, wanted: Ranges) -> tuple[int, int]:
        if "/" in dim:  # "1/3" is the second of three parts
            part = int(dim.partition("/")[0])
            return part, part + 1
        return wanted.get(dim, (0, self.sizes[dim]))


def find_placements(config: ModelConfig, family: Family) -> list[Placement]:
    """One for each weight of a model, in the order of the family's table."""
    shapes, axes_of = flatten(abstract_params(config)), flatten(logical_axes(config))
    table = {**family.weights, **(family.gated if config.gated_mlp else {})}
    unlisted = shapes.keys() - table.keys()
    assert not unlisted, f"the table of {family.architecture} misses {unlisted}"
    placements = []
    for path, (name, layout) in table.items():
        if path not in shapes:
            continue
        sizes = dict(zip(axes_of[path], shapes[path].shape, strict=True))
        names = tuple(name.format(layer) for layer in range(sizes.pop("layers", 1)))
        groups = tuple(
            tuple((joined or single).split())
            for joined, single in re.findall(r"\(([^)]*)\)|(\S+)", layout)
        )
        parts = {dim: int(dim.split("/")[1]) for group in groups for dim in group if "/" in dim}
        axes = tuple(axis for axis in axes_of[path] if axis != "layers")
        published = sizes | parts | ({"vocab": config.vocab_size} if "vocab" in sizes else {})
        stacked = "layers" in axes_of[path]
        placements.append(Placement(path, names, groups, published, axes, stacked))
    return placements


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one, its keys joined by dots.

    Example:
      >>> flatten({"norm": {"scale": 1}, "head": 2})
      {'norm.scale': 1, 'head': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
