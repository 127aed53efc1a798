"""Rows of tokens laid out as a `PlainBatch`, for encoder-decoders: prompts, and their answers.

Letters: M microbatches, S row shards, B rows of a shard.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.packing import (
    MAX_SHAPES,
    Branches,
    Grid,
    Item,
    Tokens,
    choose_shapes,
    empty_others,
    find_branches,
    is_valid,
    put_others,
    round_up,
    spread,
)
from distill_jax.student.objective import Objective
from distill_jax.student.plain import PlainBatch
from distill_jax.student.tree import NOWHERE, Counts


class PlainShape(NamedTuple):
    """The sizes of a batch that its rows decide."""

    prompt: int  # tokens behind the demonstrations
    answer: int


def plan_shapes(
    batches: Iterable[Sequence[Item]], grid: Grid, objective: Objective, *, limit: int = MAX_SHAPES
) -> dict[PlainShape, PlainShape]:
    """Few shapes that hold all batches, as `packing.plan_shapes`."""
    num_answers = len(sum(find_branches(objective), ()))
    needs = Counter(_measure(items) for items in batches)
    return choose_shapes(needs, lambda x: x.prompt + num_answers * x.answer, limit)


def count_tokens(shape: PlainShape, grid: Grid, *, shared: Tokens, objective: Objective) -> int:
    """The tokens that a step computes, padding included."""
    num_answers = len(sum(find_branches(objective), ()))
    row = len(shared) + shape.prompt + num_answers * (shape.answer + 1)
    return grid.microbatches * grid.shards * grid.rows * row


def _measure(items: Sequence[Item]) -> PlainShape:
    answers = (text for item in items for text in (item.anchor, item.positive, item.negative))
    prompt = max(len(item.prompt) for item in items)
    return PlainShape(round_up(prompt), round_up(max(map(len, answers))))


def pack(
    items: Sequence[Item],
    grid: Grid,
    shapes: Mapping[PlainShape, PlainShape],
    *,
    shared: Tokens,
    objective: Objective,
) -> PlainBatch:
    """Lays out one batch.

    Args:
      items: Its rows, at most as many as the grid holds.
      grid: Where they may go.
      shapes: From `plan_shapes`, for this batch among others.
      shared: The demonstrations, which every prompt begins with; repeated in each.
      objective: Decides which answers there are, and what a token weighs.
    """
    branches, shape = find_branches(objective), shapes[_measure(items)]
    rows = []
    for group in spread(items, grid, branches):
        rows.append(_fill(group, grid.rows, shape, shared, branches, objective))
    arrays: dict[str, Any] = {
        name: np.stack([each[name] for each in rows]).reshape(*grid[:2], *first.shape)
        for name, first in rows[0].items()
    }
    return PlainBatch(**arrays, counts=_count(items, branches, len(shared), objective))


def _fill(
    items: Sequence[Item],
    rows: int,
    shape: PlainShape,
    shared: Tokens,
    branches: Branches,
    objective: Objective,
) -> dict[str, Any]:
    """The arrays of one shard."""
    names = sum(branches, ())
    num_live = len(branches.predicting + branches.silent)
    tokens = np.zeros((rows, len(shared) + shape.prompt), np.int32)
    mask = np.zeros(tokens.shape, bool)
    answers = np.zeros((len(names), rows, shape.answer), np.int32)
    line = (len(branches.predicting), rows, shape.answer + 1)
    targets, weights = np.zeros(line, np.int32), np.zeros(line, np.float32)
    owners = NOWHERE + np.arange(targets.size, dtype=np.int32).reshape(line)
    ends, valid = np.zeros((rows, 3), np.int32), np.zeros(rows, bool)
    others = empty_others(targets.size, objective)
    for row, item in enumerate(items):
        prompt = (*shared, *item.prompt)
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
        valid[row] = is_valid(item, objective)
        for place, name in enumerate(names):
            text: Tokens = getattr(item, name)
            answers[place, row, : len(text)] = text
            kind = ("anchor", "positive", "negative").index(name)
            ends[row, kind] = (place * rows + row) * line[2] + len(text)
            if place < line[0]:
                targets[place, row, : len(text)] = text
                weights[place, row, : len(text)] = float(name == "anchor")
                owners[place, row, : len(text)] = 2 * row + (name == "negative")
            if name == "anchor" and place < line[0]:
                start = (place * rows + row) * line[2]
                put_others(others, slice(start, start + len(text)), item.others)
    return {
        "tokens": tokens, "mask": mask, "live": answers[:num_live], "cut": answers[num_live:],
        "targets": targets.ravel(), "weights": weights.ravel(), "owners": owners.ravel(),
        "ends": ends, "valid": valid, **others,
    }  # fmt: skip


def _count(
    items: Sequence[Item], branches: Branches, num_shared: int, objective: Objective
) -> Counts:
    prompts = [num_shared + len(item.prompt) for item in items]
    live = branches.predicting + branches.silent
    used = [live + branches.cut if is_valid(item, objective) else live for item in items]
    texts = [
        [len(getattr(item, name)) for name in names]
        for item, names in zip(items, used, strict=True)
    ]
    predicted = [len(getattr(item, name)) for item in items for name in branches.predicting]
    read, written = sum(prompts), sum(map(sum, texts))
    numbers: list[Any] = [
        np.float32(number)
        for number in (
            sum(len(item.anchor) for item in items),
            sum(is_valid(item, objective) for item in items),
            len(items),
            read + written,
            sum(predicted),
            sum(
                n * (n + 1) // 2 + n * p for p, row in zip(prompts, texts, strict=True) for n in row
            ),
            read,
            sum(p * p for p in prompts),
        )
    ]
    return Counts(*numbers)
