"""Attempts and rationales become the batches of a round, in seeded order.

A row is one kept rationale. What it is paired with and where it stands in an epoch depend on the
seed, the round and the epoch alone: not on the batch size of a device, nor on interruptions.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from distill_jax import packing as tree_packing
from distill_jax.packing import Grid, Item, Others, Tokens, is_valid
from distill_jax.prompts import answer_target, mistake_target, target
from distill_jax.records import GREEDY, Attempt, Form, Question, Rationale
from distill_jax.soft_targets import find_others
from distill_jax.student.objective import Objective
from distill_jax.student.plain import AnyBatch
from distill_jax.tokenizer import Tokenizer, common_length

Key = tuple[str, Form]
"""A question and what is asked of it."""

MAX_POSITIVES = 10
MAX_NEGATIVES = 4


@dataclass(frozen=True)
class Row:
    """One rationale to train on, in token ids, and what it may be paired with."""

    question_id: str
    question: Tokens  # the prompt behind the shared beginning
    anchor: Tokens
    positives: tuple[Tokens, ...]
    negatives: tuple[Tokens, ...]
    others: Others = ()  # what else may stand in the anchor's places


@dataclass(frozen=True)
class Rows:
    """All rows of a round.

    With one form, rationales, `len(rows) + sum(dropped.values())` is how many were handed in.
    """

    shared: Tokens  # what every prompt begins with, but for the last common token
    rows: tuple[Row, ...]
    dropped: Mapping[str, int]  # by reason
    num_cut_mistakes: int  # mistakes too long for the context: cut there, end token forced

    @property
    def num_pairs(self) -> int:
        """Rows that have a positive and a negative."""
        return sum(bool(row.positives and row.negatives) for row in self.rows)

    @property
    def num_targets(self) -> int:
        """Tokens to be written."""
        return sum(len(row.anchor) for row in self.rows)

    @property
    def num_soft(self) -> int:
        """Those that share their place with others."""
        return sum(bool(others) for row in self.rows for others in row.others)


def make_rows(
    rationales: Sequence[Rationale],
    attempts: Sequence[Attempt],
    questions: Mapping[str, Question],
    *,
    tokenizer: Tokenizer,
    prompts: Mapping[Form, Callable[[Question], str]],
    max_length: int,
    seed: int,
) -> Rows:
    """Tokenises what a round is trained on.

    Args:
      rationales: The kept ones; each becomes a row of every form that asks for rationales, and
        their questions' bare answers one of every form that asks for these. What becomes no row
        is counted in `dropped`.
      attempts: The exam before this round. Its drawn samples that are wrong are the negatives.
      questions: By id; holds every rationale's question.
      tokenizer: The student's.
      prompts: The forms, each with what gives a question's prompt, demonstrations included. The
        first is the exam's: only its rows have negatives.
      max_length: Tokens that the student can hold; a longer row is dropped as `too_long`.
      seed: Chooses the pools where a question has more texts than a pool holds.

    Source:
      Wang et al. (EMNLP 2023): positives are other rationales of the question with a different
      text, at most 10 kept; negatives are the distinct wrong samples, at most 4 kept.
    """
    asked = {row.question_id: questions[row.question_id] for row in rationales}
    texts: dict[Key, str] = {
        (id, form): prompts[form](asked[id]) for form in prompts for id in asked
    }
    heads = {key: tokenizer.encode_prompt(text) for key, text in texts.items()}
    # The last common token stays with the rows: demonstrations always go on with the same one.
    num_shared = max(common_length(list(heads.values())) - 1, 0)
    shared = next(iter(heads.values()))[:num_shared] if num_shared else []
    encoded = _Encoder(tokenizer, texts, heads, max_length)
    targets = list(_targets(rationales, asked, prompts))
    anchors = [(*each, encoded.anchor(*each[:2])) for each in targets]
    fitting = [each for each in anchors if len(heads[each[0]]) + len(each[-1]) <= max_length]
    wrong, exam_form = _wrong_texts(attempts), next(iter(prompts))
    negatives = {id: encoded.mistakes((id, exam_form), wrong.get(id, ())) for id in asked}
    positives: dict[Key, list[Tokens]] = {}
    for key, _, _, anchor in fitting:
        positives.setdefault(key, []).append(anchor)

    pick = np.random.default_rng([seed, len(rationales)])
    rows = []
    for key, text, source, anchor in fitting:
        different = [ids for ids in dict.fromkeys(positives[key]) if ids != anchor]
        rows.append(
            Row(
                question_id=key[0],
                question=tuple(heads[key][num_shared:]),
                anchor=anchor,
                positives=_pool(different, MAX_POSITIVES, pick),
                negatives=_pool(
                    negatives[key[0]] if key[1] == exam_form else (), MAX_NEGATIVES, pick
                ),
                others=encoded.others(text, anchor, source) if source else (),
            )
        )
    dropped = {"too_long": len(targets) - len(rows)} if len(rows) < len(targets) else {}
    return Rows(tuple(shared), tuple(rows), dropped, encoded.num_cut)


def _targets(
    rationales: Sequence[Rationale], questions: Mapping[str, Question], forms: Iterable[Form]
) -> Iterator[tuple[Key, str, Rationale | None]]:
    """All that is to be written, each with its question and form, and whose it is."""
    for form in forms:
        if form.startswith("rationale"):
            for row in rationales:
                yield (row.question_id, form), target(questions[row.question_id], row.text), row
        else:
            for id, question in questions.items():
                yield (id, form), answer_target(question), None


class _Encoder:
    """Tokenises targets behind their prompts, and counts the mistakes that had to be cut."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Mapping[Key, str],
        heads: Mapping[Key, Sequence[int]],
        max_length: int,
    ):
        self.tokenizer, self.prompts, self.heads = tokenizer, prompts, heads
        self.max_length = max_length
        self.num_cut = 0

    def anchor(self, key: Key, text: str) -> Tokens:
        return tuple(self.tokenizer.encode_target(self.prompts[key], text))

    def others(self, text: str, ids: Tokens, source: Rationale) -> Others:
        said = {"rationale": source.text, "pieces": source.pieces}
        return find_others(self.tokenizer, text, ids, **said)

    def mistakes(self, key: Key, texts: Sequence[str]) -> list[Tokens]:
        room = self.max_length - len(self.heads[key])
        found = []
        for text in texts:
            ids = self.tokenizer.encode_target(self.prompts[key], mistake_target(text))
            if len(ids) > room > 0:
                self.num_cut += 1
                ids = [*ids[: room - 1], ids[-1]]
            if room > 0:
                found.append(tuple(ids))
        return found


def _wrong_texts(attempts: Sequence[Attempt]) -> dict[str, list[str]]:
    """Each question's distinct wrong samples, in the order drawn; empty texts are no mistakes."""
    found: dict[str, dict[str, None]] = {}
    for attempt in attempts:
        if attempt.sample_index != GREEDY and not attempt.correct and attempt.text.strip():
            found.setdefault(attempt.question_id, {})[attempt.text.strip()] = None
    return {key: list(texts) for key, texts in found.items()}


def _pool(texts: Sequence[Tokens], size: int, pick: np.random.Generator) -> tuple[Tokens, ...]:
    if len(texts) <= size:
        return tuple(texts)
    return tuple(texts[i] for i in sorted(pick.choice(len(texts), size, replace=False)))


def plan_epoch(
    question_ids: Sequence[str], *, batch_size: int, seed: int, round_index: int, epoch: int
) -> list[list[int]]:
    """Which rows make up each batch of an epoch: every row once, no question twice in a batch.

    Questions are visited in random order, again and again, and give one unused row per visit; the
    batches are then shuffled. A batch is short where only questions that it already holds are
    left.

    Args:
      question_ids: Each row's question.
      batch_size: Rows of a batch, at most.
      seed: With the round and the epoch, all that the order depends on.
      round_index: From 1.
      epoch: From 0.

    Source:
      The released code's UniqueQuestionSampler, over the whole batch instead of a device's part,
      and short batches instead of repeated rows.
    """
    rng = np.random.default_rng([seed, round_index, epoch, 0])
    unused: dict[str, list[int]] = {}
    for index, question_id in enumerate(question_ids):
        unused.setdefault(question_id, []).append(index)
    for rows in unused.values():
        rng.shuffle(rows)
    batches: list[list[int]] = []
    batch: dict[str, int] = {}
    while unused:
        if all(question_id in batch for question_id in unused):
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


def draw_pairs(
    rows: Rows, *, seed: int, round_index: int, epoch: int
) -> list[tuple[Tokens, Tokens]]:
    """A positive and a negative for every row, drawn anew each epoch; () from an empty pool."""
    rng = np.random.default_rng([seed, round_index, epoch, 1])
    draws = rng.random((len(rows.rows), 2))

    def draw(pool: tuple[Tokens, ...], number: float) -> Tokens:
        return pool[int(number * len(pool))] if pool else ()

    return [
        (draw(row.positives, x), draw(row.negatives, y))
        for row, (x, y) in zip(rows.rows, draws, strict=True)
    ]


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
        batches = (items for _, items in self._items(0))
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

    def _items(self, start: int) -> Iterator[tuple[int, list[Item]]]:
        done, order = 0, {"seed": self.seed, "round_index": self.round_index}
        for epoch, plan in self._plans():
            skipped = min(max(start - done, 0), len(plan))
            done += len(plan)
            if skipped < len(plan):
                pairs = draw_pairs(self.rows, **order, epoch=epoch)
                for indices in plan[skipped:]:
                    yield epoch, [self._item(self.rows.rows[i], *pairs[i]) for i in indices]

    def _item(self, row: Row, positive: Tokens, negative: Tokens) -> Item:
        item = Item(row.question, row.anchor, positive, negative, row.others)
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
        ids = [row.question_id for row in self.rows.rows]
        return plan_epoch(ids, batch_size=self.batch_size, **order)
