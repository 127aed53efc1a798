"""Rows of tokens laid out as a `Batch`: who stands where on the line, and how long lines are.

A row goes to the device whose line is shortest. Lines and rectangles come in few sizes, chosen from
all batches of a round beforehand, so that few programs are compiled and little is padded.

Letters: M microbatches, S row shards, T tokens of a shard's line.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from distill_jax.int_lists import Tokens
from distill_jax.student.objective import LIKELIHOODS, Objective
from distill_jax.student.tree import NOWHERE, Batch, Counts

Others = tuple[tuple[tuple[int, float], ...], ...]
"""For every token of a text what else may stand in its place, with its share; () if nothing may."""
Sizes = TypeVar("Sizes", bound=tuple[int, ...])
MAX_SHAPES = 4
SPARE = 0.06
"""Share of the least cost that may be added to have fewer shapes than the limit."""
UNIT = 8
"""Sizes are multiples of this, and of a sixteenth of themselves, or a bit less."""
APART = 7 / 8
"""Where all but the longest branches of rows are shorter than so much of the longest one, they have
a rectangle of their own; else that would be more to compile than to save."""
ELEMENT = 2e-4
"""What a pair of tokens in a rectangle costs, in tokens on the line, for a width of some 2,000."""


class Item(NamedTuple):
    """A row: a prompt behind the demonstrations, and what may follow it; () for what it lacks."""

    prompt: Tokens  # at least one token
    anchor: Tokens
    positive: Tokens = ()
    negative: Tokens = ()
    others: Others = ()  # of the anchor; () where all of it is hard


class Shape(NamedTuple):
    """The sizes of a batch that its rows decide."""

    predicting: int  # tokens of questions and of branches that may predict something
    tokens: int  # of all
    question: int  # the longest question, but for its last token
    branch: int  # the longest branch, with the last token of its prompt
    other: int  # the longest that is not the longest of its row, or `branch` if it is near that


class Grid(NamedTuple):
    """The lines of a batch."""

    microbatches: int
    shards: int
    rows: int  # of each line, those included that only fill it


def make_grid(batch_size: int, *, microbatches: int, shards: int) -> Grid:
    """A grid for so many rows."""
    return Grid(microbatches, shards, -(-batch_size // (microbatches * shards)))


class Branches(NamedTuple):
    """Which branches a row has, by what becomes of them."""

    predicting: tuple[str, ...]  # may predict something
    silent: tuple[str, ...] = ()  # predict nothing, but send their gradient into the prompt
    cut: tuple[str, ...] = ()  # nor that


def find_branches(objective: Objective) -> Branches:
    """The branches of a row, for what is made small."""
    if objective.reflection == "none":
        return Branches(("anchor",))
    if objective.reflection in LIKELIHOODS:
        return Branches(("anchor", "negative"))
    if objective.prefix_gradient:
        return Branches(("anchor",), silent=("positive", "negative"))
    return Branches(("anchor",), cut=("anchor", "positive", "negative"))


def is_valid(item: Item, objective: Objective) -> bool:
    """Whether a row has all that reflection compares."""
    needs_positive = objective.reflection == "triplet"
    return bool(item.negative and (item.positive or not needs_positive))


def plan_shapes(
    batches: Iterable[Sequence[Item]], grid: Grid, objective: Objective, *, limit: int = MAX_SHAPES
) -> dict[Shape, Shape]:
    """Few shapes that hold all batches: for each that some batch needs, one that is used."""
    branches = find_branches(objective)
    needs = Counter(measure(spread(items, grid, branches), branches) for items in batches)
    return choose_shapes(needs, partial(_cost, rows=grid.rows, branches=branches), limit)


def _cost(shape: Shape, *, rows: int, branches: Branches) -> float:
    """What a line costs, in tokens."""
    longest = 1 + bool(branches.cut)
    others = len(sum(branches, ())) - longest
    pairs = shape.question**2
    for count, length in ((longest, shape.branch), (others, shape.other)):
        pairs += count * length * (shape.question + length)
    return shape.predicting / 4 + shape.tokens + ELEMENT * rows * pairs


def count_tokens(shape: Shape, grid: Grid, *, shared: Tokens, objective: Objective) -> int:
    """The tokens that a step computes, padding included."""
    return grid.microbatches * (len(shared) + grid.shards * shape.tokens)


def spread(items: Sequence[Item], grid: Grid, branches: Branches) -> list[list[Item]]:
    """The rows of each line, with as equal numbers of tokens as can be had easily."""

    def size(item: Item) -> int:
        texts = (text for kind in branches._fields for text in branch_texts(item, branches, kind))
        return len(item.prompt) - 1 + sum(map(len, texts))

    groups: list[list[Item]] = [[] for _ in range(grid.microbatches * grid.shards)]
    assert len(items) <= len(groups) * grid.rows
    room = [(0, index) for index in range(len(groups))]  # tokens so far; the emptiest first
    for item in sorted(items, key=size, reverse=True):
        tokens, index = room[0]
        groups[index].append(item)
        if len(groups[index]) < grid.rows:
            heapq.heapreplace(room, (tokens + size(item), index))
        else:
            heapq.heappop(room)
    return groups


def measure(groups: Iterable[Sequence[Item]], branches: Branches) -> Shape:
    """The smallest sizes that hold these groups, rounded up."""
    predicting = tokens = question = branch = other = 1
    for group in groups:
        asked = [len(item.prompt) - 1 for item in group]
        lengths = [
            [list(map(len, branch_texts(item, branches, kind))) for kind in Branches._fields]
            for item in group
        ]
        predicting = max(predicting, sum(asked) + sum(sum(first) for first, *_ in lengths))
        tokens = max(tokens, sum(asked) + sum(sum(map(sum, row)) for row in lengths))
        question = max(question, *asked, 1)
        for first, silent, cut in lengths:
            for each in (first + silent, cut):
                longest, second, *_ = sorted([*each, 0, 0], reverse=True)
                branch, other = max(branch, longest), max(other, second)
    other = other if other < APART * branch else branch
    return Shape(*map(round_up, (predicting, tokens, question, branch, other)))


def branch_texts(item: Item, branches: Branches, kind: str) -> list[Tokens]:
    """The branches of one kind; live ones begin with the last token of the prompt."""
    texts: list[Tokens] = [getattr(item, name) for name in getattr(branches, kind)]
    if kind == "cut":  # these serve reflection alone: rows without a pair have none
        return texts if item.positive and item.negative else [()] * len(texts)
    return [item.prompt[-1:] + text if text else () for text in texts]


def round_up(size: int) -> int:
    """The next of the few sizes that arrays come in."""
    unit = UNIT
    while unit * 32 <= size:
        unit *= 2
    return -(-size // unit) * unit


def choose_shapes(
    needs: Mapping[Sizes, int], cost: Callable[[Sizes], float], limit: int
) -> dict[Sizes, Sizes]:
    """Merges shapes, the two whose union costs least first, until few are left.

    Beyond the limit it goes on while all merging together costs no more than `SPARE`: a program
    less to compile is worth that.

    Args:
      needs: How often each shape is needed; a shape is a named tuple of sizes.
      cost: What a shape costs.
      limit: Shapes in the end, at most.

    Returns:
      For each shape that is needed one that holds it.

    Example:
      >>> needs = {Shape(64, 128, 16, 16, 8): 9, Shape(80, 112, 16, 16, 8): 9}
      >>> needs[Shape(640, 900, 16, 32, 8)] = 1
      >>> sorted(set(choose_shapes(needs, lambda shape: shape.tokens, 2).values()))[0]
      Shape(predicting=80, tokens=128, question=16, branch=16, other=8)
    """
    members = {shape: [shape] for shape in needs}
    counts = dict(needs)

    def loss(pair: tuple[Sizes, Sizes]) -> float:
        union = cost(_union(*pair))
        return float(sum(counts[shape] * (union - cost(shape)) for shape in pair))

    spare = SPARE * sum(count * cost(shape) for shape, count in needs.items())
    while len(members) > 1:
        x, y = min(itertools.combinations(members, 2), key=loss)
        spare -= loss((x, y))
        if len(members) <= limit and spare < 0:
            break
        joined, total = members.pop(x) + members.pop(y), counts.pop(x) + counts.pop(y)
        union = _union(x, y)
        members[union] = members.get(union, []) + joined
        counts[union] = counts.get(union, 0) + total
    return {need: shape for shape, needed in members.items() for need in needed}


def _union(x: Sizes, y: Sizes) -> Sizes:
    make: Any = type(x)
    return make(*map(max, x, y))


def pack(
    items: Sequence[Item],
    grid: Grid,
    shapes: Mapping[Shape, Shape],
    *,
    shared: Tokens,
    objective: Objective,
) -> Batch:
    """Lays out one batch.

    Args:
      items: Its rows, at most as many as the grid holds.
      grid: Where they may go.
      shapes: From `plan_shapes`, for this batch among others.
      shared: The demonstrations: what stands before every row's prompt; may be empty. Behind them
        all prompts go on with the same token.
      objective: Decides which branches there are, and what a token weighs.
    """
    branches = find_branches(objective)
    groups = spread(items, grid, branches)
    shape = shapes[measure(groups, branches)]
    part = -(-len(shared) // grid.shards)
    after = {item.prompt[0] for item in items}
    assert not shared or len(after) == 1, "the demonstrations' last token predicts one token"
    following = (*shared[1:], *after)
    lines = []
    for index, group in enumerate(groups):
        line = _Line(shape, branches, objective, grid.rows, part)
        microbatch = groups[index // grid.shards * grid.shards :][: grid.shards]
        begin = index % grid.shards * part
        line.put_shared(shared, following, begin, sum(map(len, microbatch)))
        line.put_rows(group, len(shared))
        lines.append(line)
    stacked: dict[str, Any] = jax.tree.map(
        lambda *parts: np.stack(parts).reshape(*grid[:2], *parts[0].shape),
        *(line.arrays() for line in lines),
    )
    numbers: Any = (
        sum(len(shared) + len(item.prompt) - 1 + len(item.anchor) for item in items),
        sum(is_valid(item, objective) for item in items),
        len(items),
        len(shared) + sum(line.num_put for line in lines),
        len(shared) + sum(line.num_predicting for line in lines),
        len(shared) * (len(shared) + 1) // 2 + sum(line.num_pairs for line in lines),
        0,  # a decoder reads nothing
        0,
    )
    counts: Any = map(np.float32, numbers)
    return Batch(**stacked, counts=Counts(*counts))


class _Line:
    """The arrays of one shard while they are filled."""

    def __init__(
        self, shape: Shape, branches: Branches, objective: Objective, rows: int, shared: int
    ):
        self.kinds, self.objective, self.shared = branches, objective, shared
        self.first, self.other = shared + shape.predicting, shape.other
        self.tokens, self.positions = np.zeros((2, shared + shape.tokens), np.int32)
        self.targets = np.zeros(self.first, np.int32)
        self.weights = np.zeros(self.first, np.float32)
        self.owners = NOWHERE + np.arange(self.first, dtype=np.int32)
        self.others = empty_others(self.first, objective)
        self.known = np.zeros(shared, bool)
        self.questions = np.full((rows, shape.question), NOWHERE)
        self.branches = np.full((rows, len(sum(branches, ())), shape.branch), NOWHERE)
        self.ends = np.zeros((rows, 3), np.int32)
        self.valid = np.zeros(rows, bool)
        self.reaches = np.zeros(len(self.tokens), bool)
        self.at = shared
        self.num_put = self.num_predicting = self.num_pairs = 0

    def put_shared(self, shared: Tokens, following: Tokens, begin: int, num_rows: int) -> None:
        """This shard's part of the demonstrations, whose predictions count once for every row."""
        mine = shared[begin : begin + self.shared]
        size = len(mine)
        self.tokens[:size], self.known[:size] = mine, True
        self.positions[:size] = begin + np.arange(size)
        self.targets[:size] = following[begin : begin + size]
        self.weights[:size] = self.objective.prompt_weight * num_rows

    def put_rows(self, items: Sequence[Item], start: int) -> None:
        """All rows, whose prompts begin at position `start`."""
        for row, item in enumerate(items):
            place = self._put(item.prompt[:-1], start)
            self.questions[row, : len(item.prompt) - 1] = np.arange(place.start, place.stop)
            self.targets[place] = item.prompt[1:]
            self.weights[place] = self.objective.prompt_weight
            self.valid[row] = is_valid(item, self.objective)
        column = 0
        for kind, names in self.kinds._asdict().items():
            for row, item in enumerate(items):
                texts = branch_texts(item, self.kinds, kind)
                position = start + len(item.prompt) - (kind != "cut")
                for index, (name, text) in enumerate(zip(names, texts, strict=True)):
                    place = self._put(text, position)
                    self._note(row, column + index, name, place)
                    if kind == "predicting":
                        self._predict(row, name, place, text)
                    if kind == "predicting" and name == "anchor":
                        put_others(self.others, place, item.others)
            if kind == "predicting":
                self.num_predicting = self.at - self.shared
            if kind == "silent":
                self.reaches[: self.at] = True
            column += len(names)

    def _put(self, text: Tokens, position: int) -> slice:
        place = slice(self.at, self.at + len(text))
        self.tokens[place] = text
        self.positions[place] = np.arange(position, position + len(text))
        self.at = place.stop
        self.num_put += len(text)
        self.num_pairs += sum(range(position + 1, position + 1 + len(text)))
        return place

    def _note(self, row: int, column: int, name: str, place: slice) -> None:
        where = np.arange(place.start, place.stop)
        self.branches[row, column, : len(where)] = where
        if len(where):
            self.ends[row, ("anchor", "positive", "negative").index(name)] = where[-1]

    def _predict(self, row: int, name: str, place: slice, text: Tokens) -> None:
        before = slice(place.start, max(place.stop - 1, place.start))
        self.targets[before] = text[1:]
        self.weights[before] = float(name == "anchor")
        self.owners[before] = 2 * row + (name == "negative")

    def arrays(self) -> dict[str, Any]:
        """What goes into the batch. Indices that point at nothing become unlike."""
        num_live = len(self.kinds.predicting + self.kinds.silent)
        live = self._by_length(self.branches[:, :num_live])
        cut = self._by_length(self.branches[:, num_live:])
        rectangles = [self.questions, *live, *cut]
        stands = np.concatenate([x.ravel() for x in rectangles])
        homes = NOWHERE + np.arange(self.tokens.size)
        taken = np.flatnonzero(stands < NOWHERE)
        homes[stands[taken]] = taken
        stands = np.where(stands < NOWHERE, stands, NOWHERE + np.arange(stands.size))
        parts = np.split(stands.astype(np.int32), np.cumsum([x.size for x in rectangles])[:-1])
        questions, *rest = (
            part.reshape(x.shape) for part, x in zip(parts, rectangles, strict=True)
        )
        return {
            "tokens": self.tokens, "positions": self.positions, "targets": self.targets,
            "weights": self.weights, "owners": self.owners, "shared": self.known,
            "questions": questions, "live": tuple(rest[: len(live)]),
            "cut": tuple(rest[len(live) :]), "homes": homes.astype(np.int32), "ends": self.ends,
            "valid": self.valid, "reaches": self.reaches, **self.others,
        }  # fmt: skip

    def _by_length(self, branches: np.ndarray) -> list[np.ndarray]:
        """The longest branch of each row and the others, apart where the others have less room."""
        if self.other >= branches.shape[2]:
            return [branches] if branches.shape[1] else []
        lengths = (branches < NOWHERE).sum(axis=2)
        order = np.argsort(-lengths, axis=1, kind="stable")
        ordered = np.take_along_axis(branches, order[:, :, None], axis=1)
        assert (ordered[:, 1:, self.other :] >= NOWHERE).all(), "a branch has no room"
        parts = (ordered[:, :1], ordered[:, 1:, : self.other])
        return [part for part in parts if part.shape[1]]


def empty_others(size: int, objective: Objective) -> dict[str, np.ndarray]:
    """Room for what else may be predicted at so many places; none where targets are hard."""
    if not objective.alternatives:
        return {}
    shape = (size, objective.alternatives)
    return {"others": np.zeros(shape, np.int32), "shares": np.zeros(shape, np.float32)}


def put_others(room: Mapping[str, np.ndarray], place: slice, others: Others) -> None:
    """Writes what else may be predicted from `place` on."""
    for index, each in enumerate(others if room else (), start=place.start):
        for column, (token, share) in enumerate(each):
            room["others"][index, column], room["shares"][index, column] = token, share
