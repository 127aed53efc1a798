"""Small random samples of training, as rows to pack."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from distill_jax.packing import Grid, Item, Shape, Tokens, pack
from distill_jax.student.objective import Objective
from distill_jax.student.plain import AnyBatch
from distill_jax.student.step import TrainState
from distill_jax.student.tree import NOWHERE, Batch

SIX = Grid(1, 1, 6)

WIDE = Shape(predicting=192, tokens=384, question=16, branch=16, other=16)
"""Holds six rows of any `make_samples`: one shape, one compilation."""

APART = WIDE._replace(other=12)
"""Holds them, too, with the longest branches in a rectangle of their own."""


def make_samples(seed: int, vocab: int, shared: int, count: int = 6) -> list[Item]:
    """Samples of unequal lengths behind the same beginning; every third has no pair."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> Tokens:
        return tuple(rng.integers(3, vocab, rng.integers(low, high)).tolist())

    beginning = text(shared + 1, shared + 2)
    return [
        Item(
            prompt=beginning + text(1, 7),
            anchor=(*text(3, 9), 2),
            positive=(*text(2, 10), 2) if i % 3 else (),
            negative=(*text(1, 8), 2) if i % 3 else (),
        )
        for i in range(count)
    ]


def make_batch(
    samples: list[Item],
    shared: int,
    objective: Objective,
    grid: Grid = SIX,
    shape: Shape = WIDE,
) -> Batch:
    """The samples as a batch whose first `shared` tokens are demonstrations."""
    items = [item._replace(prompt=item.prompt[shared:]) for item in samples]
    return pack(
        items,
        grid,
        defaultdict(lambda: shape),
        shared=samples[0].prompt[:shared],
        objective=objective,
    )


class Found(NamedTuple):
    """A row as its line holds it."""

    prompt: Tokens  # behind the demonstrations
    live: tuple[Tokens, ...]  # branches, without the prompt's last token
    cut: tuple[Tokens, ...]
    valid: bool


def find_rows(batch: AnyBatch) -> Iterator[Found]:
    """The rows of a batch, read back from its lines in the order in which they stand there."""
    assert isinstance(batch, Batch)
    for m, s, b in np.ndindex(*batch.valid.shape):
        line = np.asarray(batch.tokens[m, s])

        def read(where: Any, line: np.ndarray = line) -> Tokens:
            index = np.asarray(where)
            return tuple(line[index[index < NOWHERE]].tolist())

        def read_all(rectangles: Any, at: tuple[int, ...] = (m, s, b)) -> list[Tokens]:
            """In the order of the line; what is missing comes last."""
            found = sorted((x for part in rectangles for x in part[at]), key=lambda x: x[0])
            return [read(index) for index in found]

        live = read_all(batch.live)
        if live[0]:
            prompt = (*read(batch.questions[m, s, b]), live[0][0])
            cut = tuple(read_all(batch.cut))
            yield Found(prompt, tuple(x[1:] for x in live), cut, bool(batch.valid[m, s, b]))


def assert_same_training(one: TrainState, many: TrainState, means: Sequence[Any]) -> None:
    """Two states after the same steps on unlike meshes: moments, and what the gradients moved.

    AdamW's second moment is a mean of squares, so its root is what has the size of a gradient. And
    AdamW divides a gradient by its size, so one that is all rounding says nothing of a weight. Such
    are those of key biases, which no softmax notices: they count by their moments alone.

    Args:
      one: On one device, fetched.
      many: On several, fetched.
      means: AdamW's means of gradients after each step on one device.
    """
    for moment, to_gradient in (("mu", np.asarray), ("nu", np.sqrt)):
        expected, found = (
            [to_gradient(x) for x in jax.tree.leaves(optax.tree.get(state.opt_state, moment))]
            for state in (one, many)
        )
        largest = max(np.abs(x).max() for x in expected)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(means[0]))
    for x, y, *mus in zip(*map(jax.tree.leaves, (many.params, one.params, *means)), strict=True):
        heard = np.min(np.abs(mus), axis=0) > 1e-3 * largest
        np.testing.assert_allclose(x[heard], y[heard], rtol=0, atol=1e-5)
