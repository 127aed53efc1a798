"""Rows become the batches of a round, in seeded order.

What a row is paired with and where it stands in an epoch depend on the seed, the round and the
epoch alone: not on the batch size of a device, nor on interruptions.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from distill_jax import packing as tree_packing
from distill_jax.packing import Grid, Item, is_valid
from distill_jax.rows import Rows
from distill_jax.student.objective import Objective
from distill_jax.student.plain import AnyBatch


def plan_epoch(
    questions: Sequence[Hashable], *, batch_size: int, seed: int, round_index: int, epoch: int
) -> list[list[int]]:
    """Which rows make up each batch of an epoch: every row once, no question twice in a batch.

    Questions are visited in random order, again and again, and give one unused row per visit; the
    batches are then shuffled. A batch is short where only questions that it already holds are
    left.

    Args:
      questions: Each row's.
      batch_size: Rows of a batch, at most.
      seed: With the round and the epoch, all that the order depends on.
      round_index: From 1.
      epoch: From 0.

    Source:
      The released code's UniqueQuestionSampler, over the whole batch instead of a device's part,
      and short batches instead of repeated rows.
    """
    rng = np.random.default_rng([seed, round_index, epoch, 0])
    unused: dict[Hashable, list[int]] = {}
    for index, question in enumerate(questions):
        unused.setdefault(question, []).append(index)
    for rows in unused.values():
        rng.shuffle(rows)
    batches: list[list[int]] = []
    batch: dict[Hashable, int] = {}
    while unused:
        if all(question in batch for question in unused):
            batches.append(list(batch.values()))
            batch = {}
        names = list(unused)
        for name in (names[i] for i in rng.permutation(len(names))):
            if name in batch:
                continue
            batch[name] = unused[name].pop()
            if not unused[name]:
                del unused[name]
            if len(batch) == batch_size:
                batches.append(list(batch.values()))
                batch = {}
    if batch:
        batches.append(list(batch.values()))
    return [batches[i] for i in rng.permutation(len(batches))]


@runtime_checkable
class Packing(Protocol):
    """How batches are laid out: the module `packing`, or `plain_packing`."""

    @property
    def plan_shapes(self) -> Callable[..., dict[Any, Any]]: ...

    @property
    def pack(self) -> Callable[..., AnyBatch]: ...

    @property
    def count_tokens(self) -> Callable[..., int]: ...


@dataclass(frozen=True)
class Course:
    """All batches of a round, in an order that is known beforehand.

    Attributes:
      rows: What is trained on.
      objective: What is made small; decides which branches a row has.
      batch_size: Rows per update.
      grid: Holds so many rows.
      seed: With the round and the epoch, all that order and pairs depend on.
      round_index: From 1.
      epochs: Passes over the rows.
      steps: Updates, however many passes they take; 0: as many as the epochs make.
      packing: How batches are laid out.
    """

    rows: Rows
    objective: Objective
    batch_size: int
    grid: Grid
    seed: int
    round_index: int
    epochs: int
    steps: int = 0
    packing: Packing = tree_packing

    def __len__(self) -> int:
        return sum(len(plan) for _, plan in self._plans())

    @functools.cached_property
    def shapes(self) -> dict[Any, Any]:
        """The shape of a batch by the sizes that it needs."""
        batches = (items for _, items in self._items(0, blank=True))
        return self.packing.plan_shapes(batches, self.grid, self.objective)

    @property
    def sizes(self) -> list[int]:
        """The tokens that a step computes, for each shape."""
        settings = {"shared": self.rows.shared, "objective": self.objective}
        shapes = set(self.shapes.values())
        return sorted(self.packing.count_tokens(x, self.grid, **settings) for x in shapes)

    def batches(self, start: int = 0) -> Iterator[tuple[int, AnyBatch]]:
        """The batches from step `start` on, each with its epoch."""
        settings = {"shared": self.rows.shared, "objective": self.objective}
        for epoch, items in self._items(start):
            yield epoch, self.packing.pack(items, self.grid, self.shapes, **settings)

    def _items(self, start: int, *, blank: bool = False) -> Iterator[tuple[int, list[Item]]]:
        done = 0
        for epoch, plan in self._plans():
            skipped = min(max(start - done, 0), len(plan))
            done += len(plan)
            if skipped < len(plan):
                # a positive and a negative for every row, drawn anew each epoch
                rng = np.random.default_rng([self.seed, self.round_index, epoch, 1])
                draws = rng.random((len(self.rows), 2))
                for indices in plan[skipped:]:
                    pairs = zip(indices, draws[indices].tolist(), strict=True)
                    yield epoch, [self._item(i, pair, blank=blank) for i, pair in pairs]

    def _item(self, index: int, draws: Sequence[float], *, blank: bool) -> Item:
        item = self.rows.item(index, draws, blank=blank)
        whole = is_valid(item, self.objective)
        return item if whole else item._replace(positive=(), negative=())

    def _plans(self) -> Iterator[tuple[int, list[list[int]]]]:
        """The batches of each epoch, the last one broken off where the steps end."""
        left = self.steps
        for epoch in itertools.count():
            if epoch == self.epochs and not self.steps:
                return
            plan = self._plan(epoch)
            if not plan:
                return
            yield epoch, plan[:left] if self.steps else plan
            left -= len(plan)
            if self.steps and left <= 0:
                return

    def _plan(self, epoch: int) -> list[list[int]]:
        order = {"seed": self.seed, "round_index": self.round_index, "epoch": epoch}
        questions = [self.rows.question(index) for index in range(len(self.rows))]
        return plan_epoch(questions, batch_size=self.batch_size, **order)
