"""Sequences whose things are made when they are asked for, and not kept: there may be millions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class OnDemand(Sequence[T], Generic[T]):
    """So many things, each made anew every time.

    Example:
      >>> squares = OnDemand(3, lambda index: index**2)
      >>> squares[2], list(squares)
      (4, [0, 1, 4])
    """

    length: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> T:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.make(range(self.length)[index])
