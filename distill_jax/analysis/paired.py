"""Whether a difference on the same questions means anything: bootstrap and McNemar's test.

Letters: K pairs of runs, one for each seed; Q questions; R resamples.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from distill_jax.report.marks import wilson

RESAMPLES = 10_000
LEVEL = 0.95
Array = np.ndarray

Marks = Mapping[str, bool]
"""Right or wrong, by question. The same question has the same key in every run."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The accuracy of one row minus that of another, over the questions that both answered.

    Attributes:
      mean: In shares, from -1 to 1; every seed counts alike.
      interval: Its 95% bootstrap interval.
      num_gained: Answers that are right in the second row only, over all seeds.
      num_lost: Answers that are right in the first row only.
      p_value: McNemar's exact two-sided test, see `mcnemar`.
      p_bootstrap: The bootstrap's two-sided one: it knows of the spread from seed to seed.
      num_seeds: K.
      num_questions: Distinct ones.
    """

    mean: float
    interval: tuple[float, float]
    num_gained: int
    num_lost: int
    p_value: float
    p_bootstrap: float
    num_seeds: int
    num_questions: int


def compare_rows(before: Sequence[Marks], after: Sequence[Marks]) -> Difference:
    """Compares two rows of runs whose seeds are paired.

    Args:
      before: K runs' marks.
      after: K runs' marks; number k is paired with number k of `before`, and questions that only
        one of the two has answered don't count.

    Raises:
      ValueError: a pair of runs has no question in common.
    """
    changes = [
        {key: int(new[key]) - int(old[key]) for key in old if key in new}
        for old, new in zip(before, after, strict=True)
    ]
    if not all(changes):
        raise ValueError("two runs that are compared have no question in common.")
    values = [value for each in changes for value in each.values()]
    means = draw_means(changes)
    return Difference(
        mean=float(np.mean([np.mean(list(each.values())) for each in changes])),
        interval=_interval(means),
        num_gained=values.count(1),
        num_lost=values.count(-1),
        p_value=mcnemar(changes),
        p_bootstrap=_p_value(means),
        num_seeds=len(changes),
        num_questions=len(set().union(*changes)),
    )


def accuracy_interval(runs: Sequence[Marks]) -> tuple[float, float]:
    """The 95% interval of a row's mean accuracy: Wilson's for one run, else the bootstrap's."""
    if len(runs) == 1:
        return wilson(sum(runs[0].values()), len(runs[0]))
    return bootstrap([{key: int(right) for key, right in run.items()} for run in runs])


def bootstrap(runs: Sequence[Mapping[str, int | float]], *, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean over runs of each run's mean, see `draw_means`."""
    return _interval(draw_means(runs, seed=seed))


def _interval(means: Float[Array, " R"]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _p_value(means: Float[Array, " R"]) -> float:
    """Twice the share of means on the rarer side of 0: below 0.05 where the interval leaves out 0.

    Never 0: one draw more is counted on either side, since there are only R of them.
    """
    rarer = min(np.sum(means <= 0), np.sum(means >= 0))
    return min(1.0, 2 * float(rarer + 1) / (len(means) + 1))


def draw_means(runs: Sequence[Mapping[str, int | float]], *, seed: int = 0) -> Float[Array, " R"]:
    """Means over runs of each run's mean over questions, with both drawn again R times.

    Runs are drawn with replacement, and so are questions: the same ones for all runs where all
    answered the same questions, and for each run its own where a seed also makes the questions.
    With one run only the questions are drawn: what another seed would do is then not in it.

    Args:
      runs: K runs' values by question.
      seed: Of the draws. The same values give the same means.

    Source:
      Efron and Tibshirani, "An Introduction to the Bootstrap" (1993); drawing both ways is the
      pigeonhole bootstrap of Owen (Annals of Applied Statistics, 2007), which errs on the wide
      side. With few runs the draw of runs errs on the narrow side.
    """
    rng = np.random.default_rng(seed)
    keys = set(runs[0])
    if all(set(run) == keys for run in runs):
        table = np.array([[run[key] for run in runs] for key in sorted(keys)])
        means = _draw_by_run(table, rng)
    else:
        each = [np.array(list(run.values()))[:, None] for run in runs]
        means = np.concatenate([_draw_by_run(table, rng) for table in each], axis=1)
    drawn = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=RESAMPLES)
    return np.sum(means * drawn, axis=1) / len(runs)


def _draw_by_run(table: Real[Array, "Q K"], rng: np.random.Generator) -> Float[Array, "R K"]:
    """Each run's mean over Q questions drawn with replacement, the same ones for all runs.

    Questions whose values are alike are drawn together, as many at a time as fall to them.
    """
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    drawn = rng.multinomial(len(table), counts / len(table), size=RESAMPLES)
    return drawn @ kinds / len(table)


def mcnemar(changes: Sequence[Mapping[str, int]]) -> float:
    """McNemar's exact two-sided p-value that gains and losses are equally likely.

    With several pairs of runs, the changes of a question are added up over them, and the sign of
    each question's sum is as likely one as the other: a question that all seeds gain is one piece
    of evidence, not K. With one pair this is McNemar's test.

    Args:
      changes: K pairs' changes by question: 1 turned right, -1 turned wrong, 0 neither.

    Example:
      >>> round(mcnemar([{"a": 1, "b": 1, "c": 1, "d": -1, "e": 0}]), 4)
      0.625
    """
    sums: Counter[str] = Counter()
    for each in changes:
        sums.update(each)
    sizes = Counter(abs(value) for value in sums.values() if value)
    seen = abs(sum(sums.values()))
    chances = np.ones(1)  # of every total that flipping signs can give, from the least up
    for size, number in sizes.items():
        chances = np.convolve(chances, _flips(size, number))
    totals = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(totals) >= seen].sum()))


def _flips(size: int, number: int) -> Float[Array, " n"]:
    """The chance of every total, from the least up, of `number` terms that are +size or -size."""
    logs = [
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1)
        for k in range(number + 1)
    ]
    chances = np.zeros(2 * size * number + 1)
    chances[:: 2 * size] = np.exp(np.array(logs) - number * math.log(2))
    return chances


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, raised so that all of them may be read together.

    Source:
      Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Example:
      >>> holm([0.04, 0.01, 0.03])
      [0.06, 0.03, 0.06]
    """
    raised, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        raised[index] = highest
    return raised
