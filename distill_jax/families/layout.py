"""Where each of our weights stands in the published arrays, and how its dims are moved."""

import math
import re
from collections.abc import Mapping, Sequence
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

    def read(self, source: Any, wanted: Ranges) -> np.ndarray:
        """Reads a box of our weight, in our order of dims, as float32.

        Args:
          source: Gives a numpy array for a tuple of slices, and reads no more than that.
          wanted: The box; an axis that it leaves out is wanted whole.
        """
        covers, shape, inner = [], [], []
        for group in self.groups:
            ranges = [self._range(dim, wanted) for dim in group]
            cover, local, box = _cover(ranges, [self.sizes[dim] for dim in group])
            covers.append(cover)
            shape += local
            inner += box
        block = source[tuple(covers)].astype(np.float32)
        return self._to_ours(block.reshape(shape)[tuple(inner)])

    def write(self, target: np.ndarray, weight: np.ndarray) -> None:
        """Writes our weight of one layer, cut to the published sizes, into its place."""
        dims = [dim for group in self.groups for dim in group]
        view = target.reshape([self.sizes[dim] for dim in dims])
        view = view[tuple(slice(*self._range(dim, {})) for dim in dims)]
        self._to_ours(view)[...] = weight[tuple(slice(self.sizes[axis]) for axis in self.axes)]

    def _range(self, dim: str, wanted: Ranges) -> tuple[int, int]:
        if "/" in dim:  # "1/3" is the second of three parts
            part = int(dim.partition("/")[0])
            return part, part + 1
        return wanted.get(dim, (0, self.sizes[dim]))

    def _to_ours(self, block: np.ndarray) -> np.ndarray:
        """A view in our order of dims of a block that has every published dim."""
        dims = [dim for group in self.groups for dim in group]
        block = block.squeeze(tuple(i for i, dim in enumerate(dims) if "/" in dim))
        left = [dim for dim in dims if "/" not in dim]
        return block.transpose([left.index(axis) for axis in self.axes])


def _cover(
    ranges: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> tuple[slice, list[int], list[slice]]:
    """The stretch of a joined dim that holds a box: the stretch, its shape, the box inside it."""
    first = next((i for i, (a, b) in enumerate(ranges) if b - a != 1), len(ranges) - 1)
    offset = sum(ranges[i][0] * math.prod(sizes[i + 1 :]) for i in range(first))
    (start, stop), inner = ranges[first], math.prod(sizes[first + 1 :])
    shape = [1] * first + [stop - start, *sizes[first + 1 :]]
    box = [slice(None)] * (first + 1) + [slice(a, b) for a, b in ranges[first + 1 :]]
    return slice(offset + start * inner, offset + stop * inner), shape, box


def find_placements(config: ModelConfig, family: Family) -> list[Placement]:
    """One for each weight of a model, in the order of the family's table."""
    shapes, axes_of = flatten(abstract_params(config)), flatten(logical_axes(config))
    unlisted = shapes.keys() - family.weights.keys()
    assert not unlisted, f"the table of {family.architecture} misses {unlisted}"
    placements = []
    for path, (name, layout) in family.weights.items():
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
