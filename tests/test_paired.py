"""Intervals and tests against scipy, and against every possible flip of signs."""

import itertools

import numpy as np
import pytest
import scipy.stats

from distill_jax.analysis.paired import (
    accuracy_interval,
    bootstrap,
    compare_rows,
    holm,
    mcnemar,
)
from distill_jax.report.marks import Change, wilson

COUNTS = [(0, 0), (1, 0), (9, 2), (3, 14), (40, 40), (600, 450)]


def random_marks(rng: np.random.Generator, number: int, share: float) -> dict[str, bool]:
    return {f"q{i}": bool(rng.random() < share) for i in range(number)}


@pytest.mark.parametrize(("gained", "lost"), COUNTS)
def test_mcnemar_with_one_pair_is_the_binomial_test(gained: int, lost: int):
    changes = {f"q{i}": value for i, value in enumerate([1] * gained + [-1] * lost + [0] * 5)}
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar([changes]) == pytest.approx(expected, rel=1e-9)
    assert mcnemar([changes]) == pytest.approx(Change(gained, lost).p_value, rel=1e-9)


def test_mcnemar_with_seeds_counts_all_flips_of_questions():
    rng = np.random.default_rng(3)
    for _ in range(20):
        table = rng.integers(-1, 2, size=(3, 9))
        changes = [{f"q{i}": int(value) for i, value in enumerate(row)} for row in table]
        sums = table.sum(axis=0)
        totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=9)]
        expected = np.mean(np.array(totals) >= abs(sums.sum()))
        assert mcnemar(changes) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_of_one_run_is_scipys():
    rng = np.random.default_rng(5)
    values = rng.choice([-1, 0, 1], size=220, p=[0.1, 0.6, 0.3])
    ours = bootstrap([{f"q{i}": int(value) for i, value in enumerate(values)}])
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=rng
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.008)


def test_the_bootstrap_draws_runs_and_questions_both_ways():
    rng = np.random.default_rng(7)
    hard = rng.random(60) < 0.5  # the same questions are hard for all four runs
    table = (hard ^ (rng.random((4, 60)) < np.array([0.0, 0.1, 0.1, 0.3])[:, None])).astype(int)
    same = [{f"q{i}": int(value) for i, value in enumerate(row)} for row in table]
    own = [{f"r{k}q{i}": value for i, value in enumerate(r.values())} for k, r in enumerate(same)]
    crossed, nested = [], []
    for _ in range(6000):
        runs = rng.integers(0, 4, 4)
        questions = rng.integers(0, 60, 60)
        crossed.append(table[np.ix_(runs, questions)].mean())
        each = [table[k, rng.integers(0, 60, 60)].mean() for k in range(4)]
        nested.append(np.mean([each[k] for k in runs]))
    assert bootstrap(same) == pytest.approx(np.quantile(crossed, [0.025, 0.975]), abs=0.015)
    assert bootstrap(own) == pytest.approx(np.quantile(nested, [0.025, 0.975]), abs=0.015)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(150):
        before, after = random_marks(rng, 150, 0.5), random_marks(rng, 150, 0.6)
        low, high = compare_rows([before], [after]).interval
        held += low <= 0.1 <= high
    assert 0.89 <= held / 150 <= 0.99


def test_a_row_against_itself_shows_nothing():
    rng = np.random.default_rng(13)
    runs = [random_marks(rng, 40, 0.4) for _ in range(3)]
    found = compare_rows(runs, runs)
    assert (found.mean, found.interval) == (0.0, (0.0, 0.0))
    assert found.p_value == found.p_bootstrap == 1.0
    assert (found.num_gained, found.num_lost) == (0, 0)


def test_the_bootstraps_p_is_that_of_its_definition():
    rng = np.random.default_rng(19)
    before = [random_marks(rng, 60, 0.5) for _ in range(4)]
    after = [random_marks(rng, 60, share) for share in (0.45, 0.6, 0.65, 0.75)]
    found = compare_rows(before, after)
    table = np.array(
        [
            [new[q] - old[q] for old, new in zip(before, after, strict=True)]
            for q in map("q{}".format, range(60))
        ],
        dtype=float,
    )
    drawn = [
        table[np.ix_(rng.integers(0, 60, 60), rng.integers(0, 4, 4))].mean() for _ in range(6000)
    ]
    assert found.p_bootstrap == pytest.approx(2 * np.mean(np.array(drawn) <= 0), abs=0.03)


def test_seeds_that_disagree_make_p_large_whatever_the_questions_say():
    up, down = ({f"q{i}": right for i in range(200)} for right in (True, False))
    found = compare_rows([down] * 4 + [up], [up] * 4 + [down])
    assert found.p_value < 1e-20 and found.p_bootstrap > 0.05
    assert found.interval[0] <= 0


def test_only_questions_that_both_answered_count():
    before, after = {"a": True, "b": False, "x": True}, {"a": True, "b": True, "y": False}
    found = compare_rows([before], [after])
    assert (found.mean, found.num_gained, found.num_lost, found.num_questions) == (0.5, 1, 0, 2)
    with pytest.raises(ValueError, match="no question in common"):
        compare_rows([{"a": True}], [{"b": True}])


def test_the_interval_of_one_accuracy_is_wilsons_and_of_several_is_wider_than_a_point():
    run = {f"q{i}": i < 7 for i in range(30)}
    assert accuracy_interval([run]) == wilson(7, 30)
    low, high = accuracy_interval([run, dict.fromkeys(run, True)])
    assert low < (7 / 30 + 1) / 2 < high


def test_holm_against_its_definition():
    rng = np.random.default_rng(17)
    for _ in range(50):
        p = rng.random(6) ** 3
        order = np.argsort(p)
        expected = np.empty(6)
        expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(6, 0, -1)))
        assert holm(p.tolist()) == pytest.approx(expected)
