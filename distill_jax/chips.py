"""What accelerators can do, by their makers' data sheets."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      kinds: How the names begin that JAX gives such devices.
      flops: Dense bfloat16 operations per second.
      memory: Bytes that programs may use.
      bandwidth: Bytes per second to and from that memory.
      links: Bytes per second that it sends to its neighbours over all links together.
      torus: Dimensions of the torus that the links make; 0 for a switch.
      network: Bytes per second that it sends to other slices or machines, its share of a host's
        network cards.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float
    torus: int
    network: float


_GIB = 2.0**30

CHIPS: Mapping[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 32 * _GIB, 1.2e12, 300e9, 3, 6.25e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 200e9, 2, 3.125e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 600e9, 3, 6.25e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1640e9, 400e9, 2, 12.5e9),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * _GIB, 2039e9, 300e9, 0, 25e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80 * _GIB, 3350e9, 450e9, 0, 50e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 0, 50e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180e9, 8000e9, 900e9, 0, 50e9),
}
"""By the short names that `plan` knows. Links and network are one-way: half of what is often sold.

Source: the makers' data sheets; 80 GB cards of those that come in two sizes, SXM where there is a
choice."""


def find_chip(kind: str) -> Chip | None:
    """The chip of a JAX device by its `device_kind`; None for kinds that are not in the table.

    Example:
      >>> find_chip("NVIDIA H200").flops, find_chip("cpu")
      (989000000000000.0, None)
    """
    known = [
        (name, chip) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)
    ]
    return max(known, key=lambda pair: len(pair[0]))[1] if known else None
