"""Rows, their order and their pairs: every rationale once per epoch, nothing twice."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import find_rows
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_jax.batches import Course, plan_epoch
from distill_jax.packing import Item, make_grid
from distill_jax.records import Attempt, Question, Rationale
from distill_jax.rows import Rows, make_rows
from distill_jax.student.objective import Objective, Reflection
from distill_jax.tokenizer import Tokenizer

DEMO = "Question: what is one and one?\nReasoning: 1 + 1 = 2.\nAnswer: 2\n"


END = 1


def make_letters() -> Tokenizer:
    """A tokenizer with one token per character, its code, and an end token."""
    known = {"<unk>": 0, "</s>": END} | {chr(code): code for code in (10, *range(32, 127))}
    letters = tokenizers.Tokenizer(models.WordLevel(known, "<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>", eos_token="</s>")
    return Tokenizer(fast)


LETTERS = make_letters()


def spell(ids: Iterable[int]) -> str:
    return "".join(map(chr, ids))


def question(name: str) -> Question:
    return Question(id=name, text=f"what is {name}?", answer="4", split="train", kind="numeric")


def rationale(name: str, text: str, index: int = 0) -> Rationale:
    return Rationale(name, 1, index, text, "4", "kept")


def attempt(name: str, text: str, index: int, *, correct: bool = False) -> Attempt:
    return Attempt(name, 0, index, text, "5", correct, False, 3)


def rows_of(rationales: list[Rationale], attempts: list[Attempt], max_length: int = 500) -> Rows:
    questions = {row.question_id: question(row.question_id) for row in rationales}
    return make_rows(
        rationales,
        attempts,
        questions,
        tokenizer=LETTERS,
        prompts={"rationale": lambda q: f"{DEMO}\nQuestion: {q.text}\nReasoning:"},
        max_length=max_length,
        seed=0,
    )


def test_rows_share_the_beginning_of_all_prompts_and_end_with_the_end_token():
    rows = rows_of([rationale("two", "a"), rationale("three", "b c")], [])
    shared = "".join(map(chr, rows.shared))
    assert shared == f"{DEMO}\nQuestion: what is "
    first, second = rows
    assert "".join(map(chr, first.question)) == "two?\nReasoning:"
    assert "".join(map(chr, second.anchor[:-1])) == " b c\nAnswer: 4"
    assert second.anchor[-1] == END


def test_positives_differ_in_text_and_negatives_are_the_distinct_wrong_samples():
    rationales = [rationale("q", "same", 0), rationale("q", "same", 1), rationale("q", "other", 2)]
    attempts = [
        attempt("q", "greedy wrong", 0),
        attempt("q", "wrong", 1),
        attempt("q", " wrong ", 2),
        attempt("q", "right", 3, correct=True),
        attempt("q", "  ", 4),
        attempt("elsewhere", "wrong", 1),
    ]
    rows = rows_of(rationales, attempts)
    assert [len(row.positives) for row in rows] == [1, 1, 2 - 1]
    assert rows[0].positives[0] == rows[2].anchor
    assert rows[2].positives[0] == rows[0].anchor
    (negative,) = rows[0].negatives
    assert "".join(map(chr, negative[:-1])) == " wrong"
    assert rows.num_pairs == 3


def test_what_the_context_cannot_hold_is_counted():
    short, long = rationale("q", "ok", 0), rationale("q", "x" * 100, 1)
    room = len(f"{DEMO}\nQuestion: what is q?\nReasoning:") + 40
    rows = rows_of([short, long], [attempt("q", "y" * 90, 1)], max_length=room)
    assert len(rows) + sum(rows.dropped.values()) == 2
    assert rows.dropped == {"too_long": 1} and rows.num_cut_mistakes == 1
    (negative,) = rows[0].negatives
    assert len(negative) == 40 and negative[-1] == END
    assert rows[0].positives == ()


def test_attempts_at_a_question_must_stand_together():
    torn = [attempt("q", "wrong", 1), attempt("p", "wrong", 1), attempt("q", "false", 2)]
    with pytest.raises(ValueError, match="those at 'q' do not"):
        rows_of([rationale("q", "text"), rationale("p", "text")], torn)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once_and_no_question_twice_in_a_batch(counts, batch_size, epoch):
    ids = [f"q{i}" for i, count in enumerate(counts) for _ in range(count)]
    plan = plan_epoch(ids, batch_size=batch_size, seed=3, round_index=1, epoch=epoch)
    assert sorted(row for batch in plan for row in batch) == list(range(len(ids)))
    for batch in plan:
        names = [ids[row] for row in batch]
        assert 0 < len(names) <= batch_size
        assert len(set(names)) == len(names)


def test_order_depends_on_seed_round_and_epoch_alone():
    ids = [f"q{i % 9}" for i in range(30)]
    known = {"batch_size": 4, "seed": 1, "round_index": 1, "epoch": 0}
    plan = plan_epoch(ids, **known)
    assert plan == plan_epoch(ids, **known)
    for name in ("seed", "round_index", "epoch"):
        assert plan != plan_epoch(ids, **{**known, name: known[name] + 1})


@pytest.fixture
def rows() -> Rows:
    rationales = [rationale(f"q{i}", f"text {j}", j) for i in range(7) for j in range(1 + i % 3)]
    attempts = [attempt(f"q{i}", f"wrong {j}", j) for i in range(0, 7, 2) for j in (1, 2)]
    return rows_of(rationales, attempts)


def make_course(
    rows: Rows, *, reflection: Reflection = "triplet", lines: int = 1, epochs: int = 3
) -> Course:
    return Course(
        rows,
        Objective(reflection=reflection),
        batch_size=4,
        grid=make_grid(4, microbatches=1, shards=lines),
        seed=5,
        round_index=1,
        epochs=epochs,
    )


@pytest.mark.parametrize("lines", [1, 3])
def test_batches_hold_the_rows_of_each_epoch(rows: Rows, lines: int):
    expected = Counter(spell((*row.question, *row.anchor)) for row in rows)
    course = make_course(rows, lines=lines)
    found = list(course.batches())
    assert len(found) == len(course)
    for epoch in range(3):
        texts = Counter(
            spell((*row.prompt, *row.live[0]))
            for at, batch in found
            if at == epoch
            for row in find_rows(batch)
        )
        assert texts == expected


def test_starting_late_gives_the_same_batches(rows: Rows):
    course = make_course(rows)
    whole = list(course.batches())
    for start in (1, 5, len(whole) - 1):
        for (epoch, batch), (late_epoch, late) in zip(
            whole[start:], make_course(rows).batches(start), strict=True
        ):
            assert epoch == late_epoch
            for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(late), strict=True):
                assert np.array_equal(a, b)


def test_the_batches_of_a_round_have_few_shapes(rows: Rows):
    course = make_course(rows, epochs=20)
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch)) for _, batch in course.batches()}
    assert len(course.shapes) > 1 and len(shapes) <= len(set(course.shapes.values())) <= 4


def test_pairs_are_drawn_anew_each_epoch_and_belong_to_their_question(rows: Rows):
    drawn: dict[str, set[str]] = {}
    for _, batch in make_course(rows, epochs=12).batches():
        for row in find_rows(batch):
            anchor, positive, negative = map(spell, row.cut)
            if row.valid:
                assert positive != anchor == spell(row.live[0]) and "wrong" in negative
                drawn.setdefault(spell(row.prompt) + anchor, set()).add(negative)
            else:
                assert not positive and not negative
    assert drawn and all(len(negatives) == 2 for negatives in drawn.values())


def test_likelihoods_need_no_second_right_rationale(rows: Rows):
    def count(reflection: Reflection) -> int:
        batches = make_course(rows, reflection=reflection, epochs=1).batches()
        return sum(int(batch.counts.valid) for _, batch in batches)

    assert count("triplet") == rows.num_pairs < count("ranking") == count("dpo")


def test_without_reflection_there_is_one_branch(rows: Rows):
    for _, batch in make_course(rows, reflection="none").batches():
        assert [part.shape[3] for part in batch.live] == [1] and not batch.cut


def test_each_form_has_its_rows_and_only_the_exams_form_has_negatives():
    rationales = [rationale("q", "one", 0), rationale("q", "two", 1), rationale("p", "three")]
    rows = make_rows(
        rationales,
        [attempt("q", "wrong", 1)],
        {name: question(name) for name in "pq"},
        tokenizer=LETTERS,
        prompts={
            "rationale": lambda q: f"{DEMO}\nQuestion: {q.text}\nReasoning:",
            "answer_alone": lambda q: f"Question: {q.text}\nAnswer:",
        },
        max_length=500,
        seed=0,
    )
    shared = spell(rows.shared)
    told = [shared + spell(row.question) + spell(row.anchor[:-1]) for row in rows]
    assert told == [
        f"{DEMO}\nQuestion: what is q?\nReasoning: one\nAnswer: 4",
        f"{DEMO}\nQuestion: what is q?\nReasoning: two\nAnswer: 4",
        f"{DEMO}\nQuestion: what is p?\nReasoning: three\nAnswer: 4",
        "Question: what is q?\nAnswer: 4",
        "Question: what is p?\nAnswer: 4",
    ]
    assert [len(row.negatives) for row in rows] == [1, 1, 0, 0, 0]
    assert [len(row.positives) for row in rows] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
def test_steps_break_off_or_go_on_past_the_epochs(rows: Rows, steps: int):
    grid = make_grid(4, microbatches=1, shards=1)
    course = Course(
        rows, Objective(reflection="none"), 4, grid, seed=1, round_index=1, epochs=2, steps=steps
    )
    by_epochs = [epoch for epoch, _ in dataclasses.replace(course, steps=0).batches()]
    epochs = [epoch for epoch, _ in course.batches()]
    assert len(course) == len(epochs) == steps
    num_each = by_epochs.count(0)
    assert epochs == [step // num_each for step in range(steps)]
    assert [epoch for epoch, _ in course.batches(2)] == epochs[2:]


def size(item: Item) -> tuple[int, ...]:
    return tuple(len(text) for text in item[:4])


class Unpacked:
    """Batches as they are before they are packed, and the sizes that shapes are planned for."""

    planned: list[list[tuple[int, ...]]]

    def plan_shapes(self, batches, grid, objective) -> dict:
        self.planned = [[size(item) for item in items] for items in batches]
        return {}

    def pack(self, items, grid, shapes, *, shared, objective) -> Any:
        return items

    def count_tokens(self, shape, grid, *, shared, objective) -> int:
        return 0


def test_order_pairs_pools_and_lengths_stay_as_they_are():
    """With full pools, mistakes that are cut, and two forms. If a change is meant, take the new."""
    names = [f"q{i}" for i in range(9)]
    texts = [f"{'so ' * (i % 5)}text {i % 13}" for i in range(14)]
    rationales = [rationale(name, text, i) for i, text in enumerate(texts) for name in names]
    attempts = [
        attempt(name, f"wrong {'and ' * (40 * (i == 5))}{i % 6}", i, correct=i == 4)
        for name in ("elsewhere", *names[2:])
        for i in range(8)
    ]
    rows = make_rows(
        [*rationales, rationale("q3", "x" * 300)],
        attempts,
        {name: question(name) for name in names},
        tokenizer=LETTERS,
        prompts={
            "rationale": lambda q: f"{DEMO}\nQuestion: {q.text}\nReasoning:",
            "answer": lambda q: f"{DEMO}\nQuestion: {q.text}\nAnswer:",
        },
        max_length=240,
        seed=7,
    )
    assert rows.dropped == {"too_long": 1} and rows.num_cut_mistakes == 7
    packing = Unpacked()
    course = dataclasses.replace(make_course(rows, epochs=2), packing=packing)
    found: list[Any] = list(course.batches())
    assert packing.planned == [[size(item) for item in items] for _, items in found]
    told = repr((rows.num_pairs, rows.num_targets, rows.shared, found))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "4380028e9c968e38"
