"""Rows on lines: nothing is lost, little is padded, and few shapes are needed."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import find_rows, make_samples

from distill_jax.packing import Grid, Item, Shape, choose_shapes, make_grid, pack, plan_shapes
from distill_jax.student.objective import Objective
from distill_jax.student.tree import NOWHERE

OBJECTIVES = [
    Objective(reflection="none"),
    Objective(prefix_gradient=False),
    Objective(prefix_gradient=True),
    Objective(reflection="dpo"),
]


def expected_branches(item: Item, objective: Objective) -> tuple[tuple, tuple]:
    anchor, positive, negative = item[1:4]
    if objective.reflection == "none":
        return (anchor,), ()
    if objective.reflection == "dpo":
        return (anchor, negative), ()
    if objective.prefix_gradient:
        return (anchor, positive, negative), ()
    return (anchor,), (anchor, positive, negative) if positive else ((), (), ())


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    shared=st.integers(0, 9),
    count=st.integers(1, 9),
    microbatches=st.integers(1, 3),
    shards=st.integers(1, 3),
)
def test_every_token_stands_on_a_line_once(objective, seed, shared, count, microbatches, shards):
    samples = make_samples(seed, 99, shared, count)
    items = [item._replace(prompt=item.prompt[shared:]) for item in samples]
    grid = make_grid(9, microbatches=microbatches, shards=shards)
    shapes = plan_shapes([items], grid, objective)
    batch = pack(items, grid, shapes, shared=samples[0].prompt[:shared], objective=objective)

    found = Counter((row.prompt, row.live, row.cut) for row in find_rows(batch))
    assert found == Counter((item.prompt, *expected_branches(item, objective)) for item in items)
    for line in np.ndindex(microbatches, shards):
        parts = (batch.questions, *batch.live, *batch.cut)
        stands = np.concatenate([part[line].ravel() for part in parts])
        assert len(set(stands.tolist())) == len(stands), "an index occurs twice"
        places = np.flatnonzero(batch.homes[line] < NOWHERE)
        assert sorted(stands[stands < NOWHERE]) == places.tolist()
        np.testing.assert_array_equal(stands[batch.homes[line][places]], places)
    known = batch.tokens[0, :, : batch.shared.shape[2]][batch.shared[0]]
    assert tuple(known.tolist()) == samples[0].prompt[:shared]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_those_of_the_flat_sequences(objective):
    samples = make_samples(3, 99, 5)
    items = [item._replace(prompt=item.prompt[5:]) for item in samples]
    grid = Grid(2, 2, 2)
    shapes = plan_shapes([items], grid, objective)
    batch = pack(items, grid, shapes, shared=samples[0].prompt[:5], objective=objective)
    prompts = sum(len(item.prompt) - 1 for item in samples)
    anchors = sum(len(item.anchor) for item in samples)
    assert batch.counts.predicted == prompts + anchors
    assert batch.counts.real == 6
    np.testing.assert_allclose(batch.weights.sum(), 0.1 * prompts + anchors, rtol=1e-6)
    pairs = Counter()
    for text in ((*item.prompt, *item.anchor) for item in samples):
        pairs.update(itertools.pairwise(text))
    first = batch.targets.shape[2]
    weighed = zip(batch.tokens[..., :first].ravel(), batch.targets.ravel(), strict=True)
    seen = {pair for pair, w in zip(weighed, batch.weights.ravel(), strict=True) if w}
    assert seen == set(pairs)


def test_a_row_without_a_pair_takes_the_room_of_its_anchor_alone():
    whole = next(item for item in make_samples(3, 99, 0) if item.positive and item.negative)
    grid = make_grid(2, microbatches=1, shards=1)
    for alone in ({"positive": ()}, {"negative": ()}, {"positive": (), "negative": ()}):
        items = [whole._replace(**alone)] * 2
        plain, paired = (
            pack(items, grid, plan_shapes([items], grid, x), shared=(), objective=x)
            for x in (Objective(reflection="none"), Objective())
        )
        assert not paired.valid.any()
        for name in ("useful", "pairs", "predictions"):
            assert getattr(paired.counts, name) == getattr(plain.counts, name)
        assert paired.computed == plain.computed


def test_most_of_what_is_computed_is_useful_at_the_lengths_of_gsm8k():
    rng = np.random.default_rng(0)

    def text(mean: float, spread: float) -> tuple[int, ...]:
        return (5,) * max(int(rng.lognormal(np.log(mean) - spread**2 / 2, spread)), 2)

    steps = [
        [Item(text(62, 0.33), text(76, 0.317), text(76, 0.317), text(76, 0.317)) for _ in range(16)]
        for _ in range(60)
    ]
    for shards in (1, 8):
        for objective in OBJECTIVES:
            grid = make_grid(16, microbatches=1, shards=shards)
            shapes = plan_shapes(steps, grid, objective)
            assert len(set(shapes.values())) <= 4
            batches = [
                pack(items, grid, shapes, shared=(5,) * 442, objective=objective) for items in steps
            ]
            useful = sum(float(batch.counts.useful) for batch in batches)
            assert useful / sum(batch.tokens.size for batch in batches) >= 0.85


def test_shapes_hold_what_needs_them_and_are_few():
    needs = {Shape(64 * i, 64 * i + 64, 16, 16 * (1 + i % 3), 16): i for i in range(1, 12)}
    chosen = choose_shapes(needs, lambda shape: shape.tokens, 3)
    assert chosen.keys() == needs.keys() and 1 < len(set(chosen.values())) <= 3
    for need, shape in chosen.items():
        assert all(x >= y for x, y in zip(shape, need, strict=True))


def test_branches_that_are_far_shorter_than_the_longest_have_a_rectangle_of_their_own():
    def sizes(second: int, objective: Objective) -> list[list[tuple[int, ...]]]:
        items = [Item((5,) * 4, (5,) * 99, (6,) * second, (7,) * 20), Item((5,) * 4, (5,) * 50)]
        grid = make_grid(2, microbatches=1, shards=1)
        shapes = plan_shapes([items], grid, objective)
        batch = pack(items, grid, shapes, shared=(), objective=objective)
        return [[part.shape[3:] for part in kind] for kind in (batch.live, batch.cut)]

    assert sizes(60, Objective(prefix_gradient=True)) == [[(1, 104), (2, 64)], []]
    assert sizes(60, Objective()) == [[(1, 104)], [(1, 104), (2, 64)]]
    assert sizes(95, Objective(prefix_gradient=True)) == [[(3, 104)], []]
