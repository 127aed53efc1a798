"""Millions of short lists of whole numbers, such as token ids, held in one array.

That is two or four bytes a number. A tuple takes eight, the number itself, and 40 for the tuple.
"""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

Tokens = tuple[int, ...]

MIN_SHARED = 32
"""A shorter common beginning is not worth a pass of its own."""


class IntLists:
    """Lists by number, from 0.

    Args:
      limit: All numbers are from 0 to less than this; up to 65,536 they take two bytes each.

    Example:
      >>> texts = IntLists()
      >>> texts.append([7, 8]), texts.append([]), texts[0], texts.lengths.tolist()
      (0, 1, (7, 8), [2, 0])
    """

    def __init__(self, limit: int = 2**31) -> None:
        self._ids, self._ends = array("H" if limit <= 2**16 else "i"), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Tokens:
        return tuple(self._ids[self._ends[number] : self._ends[number + 1]])

    def append(self, ids: Sequence[int]) -> int:
        """Adds a list; returns its number."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))
        return len(self) - 1

    def get(self, number: int, index: int) -> int:
        """One number of a list."""
        return self._ids[self._ends[number] + index]

    def length(self, number: int) -> int:
        """How long a list is."""
        return self._ends[number + 1] - self._ends[number]

    @property
    def lengths(self) -> np.ndarray:
        """How long each list is, int64."""
        return np.diff(np.frombuffer(self._ends, np.int64))


class Prompts:
    """Prompts by number, from 0, as a common beginning and what follows it.

    Attributes:
      first: The first of them.

    Example:
      >>> prompts = Prompts([[*range(40), 7, 8], [*range(40), 9]])
      >>> prompts.num_common, prompts.behind(0, 40), prompts.behind(1, 39), prompts.length(0)
      (40, (7, 8), (39, 9), 42)
      >>> Prompts([[1, 2, 3], [1, 2, 4]]).num_common
      0
    """

    def __init__(self, prompts: Iterable[Sequence[int]] = ()) -> None:
        self.first: list[int] = []
        self._common = 0  # tokens that all have in common so far, leaving each at least one
        self._cuts, self._tails = array("i"), IntLists()
        for ids in prompts:
            self.append(ids)

    def __len__(self) -> int:
        return len(self._cuts)

    def append(self, ids: Sequence[int]) -> int:
        """Adds a prompt of at least one token; returns its number."""
        ids = list(ids)
        if not len(self):
            self.first, self._common = ids, len(ids) - 1
        self._common = min(self._common, len(ids) - 1)
        if ids[: self._common] != self.first[: self._common]:
            pairs = zip(ids, self.first, strict=False)
            self._common = next(i for i, (x, y) in enumerate(pairs) if x != y)
        self._cuts.append(self._common)
        return self._tails.append(ids[self._common :])

    @property
    def num_common(self) -> int:
        """How many tokens all prompts begin with, leaving each at least one; 0 if they are few."""
        return self._common if self._common >= MIN_SHARED else 0

    def behind(self, number: int, start: int) -> Tokens:
        """A prompt without its first `start` tokens, which are common to all."""
        # what was cut off it was common then: it is the beginning of the first prompt
        return (*self.first[start : self._cuts[number]], *self._tails[number])

    def length(self, number: int) -> int:
        """How many tokens a prompt has."""
        return self._cuts[number] + self._tails.length(number)
