"""Drawing tokens: against sorting in numpy, and against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distill_jax.student.sampling import PILE, Sampling, choose, draw, largest, uniforms, weigh

FILTERS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=10_000),
    Sampling(top_p=0.8),
    Sampling(top_p=0.05),
    Sampling(temperature=1.7, top_k=20, top_p=0.6),
]


def reference(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by sorting, in float64; ties of the last one kept are kept too."""
    scores = scores.astype(np.float64) / sampling.temperature
    ordered = np.sort(scores)[::-1]
    if 0 < sampling.top_k < len(scores):
        scores = np.where(scores >= ordered[sampling.top_k - 1], scores, -np.inf)
    chance = np.exp(scores - scores.max())
    chance /= chance.sum()
    if sampling.top_p < 1:
        above = np.array([chance[scores > score].sum() for score in scores])
        chance = np.where(above < sampling.top_p, chance, 0.0)
    return chance / chance.sum()


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_the_same_tokens_are_kept_as_by_sorting(sampling, ties):
    scores = np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32) * 3
    scores[:, 250:] = -np.inf
    if ties:
        scores = np.round(scores * 2) / 2
    chance = np.asarray(weigh(jnp.asarray(scores), sampling), np.float64)
    chance /= chance.sum(axis=1, keepdims=True)
    expected = np.stack([reference(row, sampling) for row in scores])
    np.testing.assert_array_equal(chance > 0, expected > 0)
    np.testing.assert_allclose(chance, expected, atol=1e-6)


def test_both_zeros_tie():
    scores = jnp.array([[0.0, -1.0, -0.0, 1.0], [-0.0, 1.0, -1.0, 0.0]])
    kept = np.asarray(weigh(scores, Sampling(top_k=2)) > 0)
    np.testing.assert_array_equal(kept, np.asarray(scores) > -1)


def draws(scores: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    uniform = jax.random.uniform(jax.random.key(3), (count,))
    rows = jnp.broadcast_to(jnp.asarray(scores), (count, len(scores)))
    return np.bincount(
        jax.jit(draw, static_argnums=2)(rows, uniform, sampling), minlength=len(scores)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=4),
        Sampling(top_p=0.9),
        Sampling(temperature=0.7, top_k=50, top_p=0.95),
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(sampling):
    # 300 tokens are three blocks; the likely ones lie in different blocks.
    scores = np.random.default_rng(1).normal(size=300).astype(np.float32) * 2.5
    expected = reference(scores, sampling)
    counts = draws(scores, sampling, 50_000)
    assert counts[expected == 0].sum() == 0
    likely = expected * counts.sum() >= 5
    observed = [*counts[likely], counts[~likely].sum()]
    wanted = np.array([*expected[likely], expected[~likely].sum()]) * counts.sum()
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-4


def test_a_token_without_chance_is_never_drawn():
    # The smallest and the largest number that `uniforms` can give, with zeros at every end.
    chance = np.random.default_rng(2).random((500, 400)).astype(np.float32)
    chance[np.random.default_rng(3).random(chance.shape) < 0.9] = 0.0
    chance[:, [0, 127, 128, 399]] = 0.0
    scores = jnp.log(jnp.asarray(chance))
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    for uniform, place in ((0.0, 0), (largest, -1)):
        drawn = jax.jit(draw, static_argnums=2)(scores, jnp.full(500, uniform), Sampling())
        ends = [np.flatnonzero(row)[place] for row in chance]
        np.testing.assert_array_equal(drawn, ends)


def test_the_number_of_a_token_depends_on_its_key_and_place_alone():
    keys = np.random.default_rng(4).integers(0, 2**32, (6, 2), dtype=np.uint32)
    step = jnp.full(6, 9)
    every = np.asarray(uniforms(jnp.asarray(keys), step))
    assert len(set(every.tolist())) == 6
    assert ((every >= 0) & (every < 1)).all()
    np.testing.assert_array_equal(uniforms(jnp.asarray(keys[4:1:-1]), step[:3]), every[4:1:-1])
    assert not np.isin(uniforms(jnp.asarray(keys), step + 1), every).any()


@pytest.mark.parametrize(("size", "count"), [(300, 7), (1000, 50), (40, 40), (33, 2)])
def test_the_largest_are_those_of_sorting(size, count):
    scores = np.random.default_rng(5).normal(size=(30, size)).astype(np.float32)
    scores[:, 1] = -np.inf
    best, tokens = largest(jnp.asarray(scores), count)
    wanted = np.argsort(-scores, axis=1)[:, :count]
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, wanted, axis=1))


@pytest.mark.parametrize("sampling", [Sampling(top_k=5), Sampling(top_k=5, top_p=0.7), Sampling()])
def test_rows_choose_the_likeliest_or_draw_by_the_exact_probabilities(sampling):
    # The vocabulary is large enough that a small k is found without weighing all of it.
    rng = np.random.default_rng(7)
    scores = rng.normal(size=5 * PILE * 4).astype(np.float32) * 2
    rows = jnp.broadcast_to(jnp.asarray(scores), (20_000, len(scores)))
    keys = jnp.asarray(rng.integers(0, 2**32, (20_000, 2), dtype=np.uint32))
    steps = jnp.asarray(rng.integers(0, 9, 20_000))
    greedy = jnp.arange(20_000) % 4 == 0
    tokens = np.asarray(jax.jit(choose, static_argnums=4)(rows, keys, steps, greedy, sampling))
    assert (tokens[greedy] == scores.argmax()).all()
    counts = np.bincount(tokens[~greedy], minlength=len(scores))
    expected = reference(scores, sampling)
    assert counts[expected == 0].sum() == 0
    likely = expected * counts.sum() >= 5
    observed = [*counts[likely], counts[~likely].sum()]
    wanted = np.array([*expected[likely], expected[~likely].sum()]) * counts.sum()
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-4
    every = choose(rows[:3], keys[:3], steps[:3], None, sampling)
    assert (every == scores.argmax()).all()
