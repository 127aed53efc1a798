"""How fast and how often: played on a clock of our own, an hour in a millisecond."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.teacher.governor import Bucket, Circuit, Governor, Limit, Patience, Tries
from distill_jax.teacher.reply import Fault, FaultKind

PATIENCE = Patience(attempts=4, bad_answers=2, cool_down_s=8.0, outage_s=100.0)


def fault(kind: FaultKind, retry_after_s: float | None = None) -> Fault:
    return Fault(kind, "", billed=False, retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("kinds", "longest_waits"),
    [
        (["server error"] * 4, [1.0, 2.0, 4.0, None]),
        (["connection", "timeout", "server error", "timeout"], [1.0, 2.0, 4.0, None]),
        (["bad answer"] * 2, [1.0, None]),
        (["refused prompt"], [None]),
        (["rate limit"] * 9, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]),
        (["rate limit", "server error", "rate limit", "server error"], [1.0, 1.0, 2.0, 2.0]),
    ],
)
def test_waits_grow_and_end(kinds: list[FaultKind], longest_waits: list[float | None]):
    drawn = []
    for seed in range(200):
        tries, random = Tries(), Random(seed)
        drawn.append([tries.next_wait(fault(kind), PATIENCE, random) for kind in kinds])
    for waits, longest in zip(zip(*drawn, strict=True), longest_waits, strict=True):
        if longest is None:
            assert set(waits) == {None}
        else:  # full jitter: from nothing to the longest
            assert 0.9 * longest < max(waits) <= longest and min(waits) < 0.1 * longest


def test_a_named_wait_is_a_lower_bound_and_costs_no_attempt():
    tries = Tries()
    for _ in range(50):
        wait = tries.next_wait(fault("rate limit", 30.0), PATIENCE, Random(0))
        assert wait is not None and 30.0 <= wait <= 31.0
    wait = tries.next_wait(fault("server error", 30.0), PATIENCE, Random(0))
    assert wait is not None and wait >= 30.0 and tries.faults == 1


@pytest.mark.parametrize("burst", [1, 50])
def test_a_burst_of_refusals_halves_the_limit_once_and_it_comes_back(burst: int):
    limit = Limit(ceiling=64)
    cuts = [limit.cut(sent=10.0 + i / 100, now=11.0 + i / 100) for i in range(burst)]
    assert sum(cuts) == 1 and limit.now == 32
    assert limit.cut(sent=12.0, now=12.5) and limit.now == 16
    answers = 0
    while limit.now < 0.8 * 64:
        limit.rise()
        answers += 1
    assert answers < 2000  # a minute or two at 20 a second
    for _ in range(10_000):
        limit.rise()
    assert limit.now == 64
    for second in range(100, 200):
        limit.cut(sent=float(second), now=second + 0.5)
    assert limit.now == 1  # never none at all


@given(
    per_minute=st.integers(1, 5000),
    amounts=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    idle=st.floats(0.0, 500.0),
)
def test_no_minute_gets_more_than_its_allowance(per_minute: int, amounts: list[int], idle: float):
    amounts = [min(amount, per_minute) for amount in amounts]
    bucket, now, taken = Bucket(per_minute), idle, []
    for amount in amounts:
        while (wait := bucket.wait(amount, now=now)) > 0.0:
            assert wait < 121.0
            now += wait + 1e-9
        bucket.take(amount, now=now)
        taken.append((now, amount))
    for start, _ in taken:
        minute = sum(amount for at, amount in taken if start <= at < start + 60.0)
        assert minute <= per_minute + max(amounts)


@pytest.mark.parametrize("per_minute", [1, 7, 60, 600, 3000, 20_000])
def test_at_least_95_percent_of_the_allowance_is_used(per_minute: int):
    bucket, now = Bucket(per_minute), 0.0
    for _ in range(2 * per_minute):
        now += bucket.wait(1, now=now)
        bucket.take(1, now=now)
    assert 2 * per_minute / (now / 60.0) >= 0.95 * per_minute
    assert now >= 60.0 * (2 - 1 - 1 / per_minute)


def test_what_was_not_used_is_given_back():
    bucket = Bucket(600)
    bucket.take(10, now=0.0)
    assert bucket.wait(5, now=0.0) > 0.4
    bucket.take(-5, now=0.0)
    assert bucket.wait(5, now=0.0) == 0.0


def play(circuit: Circuit, good: bool, at: float) -> None:
    assert circuit.wait(now=at) == 0.0
    circuit.admit()
    if good:
        circuit.answered()
    else:
        circuit.failed(sent=at, now=at)


def test_the_circuit_opens_over_half_probes_alone_and_closes():
    circuit = Circuit(PATIENCE)
    for at in range(10):
        play(circuit, at % 2 == 0, float(at))
    assert circuit.wait(now=10.0) == 0.0  # half of them failed: not more
    play(circuit, False, 10.0)
    assert circuit.wait(now=10.0) == 8.0
    circuit.failed(sent=9.0, now=12.0)  # was on its way already
    assert circuit.wait(now=18.0) == 0.0
    circuit.admit()
    assert circuit.wait(now=19.0) == math.inf  # one probe at a time
    circuit.failed(sent=18.0, now=20.0)
    assert circuit.wait(now=20.0) == 16.0
    assert not circuit.out(now=36.0)
    play(circuit, True, 36.0)
    assert [circuit.wait(now=36.0) for _ in range(3)] == [0.0] * 3
    play(circuit, False, 37.0)  # one failure after that doesn't open it again
    assert circuit.wait(now=37.0) == 0.0


def test_an_outage_ends_the_asking():
    circuit, at = Circuit(PATIENCE), 0.0
    while not circuit.out(now=at):
        at += circuit.wait(now=at)
        play(circuit, False, at)
        at += 0.1
        assert at < 300.0
    assert at >= 100.0


def test_the_governor_joins_them():
    governor = Governor(concurrency=2, per_minute=(0, 0), patience=PATIENCE)
    governor.admit(5, now=0.0)
    assert governor.wait(5, now=0.0) == 0.0
    governor.admit(5, now=0.0)
    assert governor.wait(5, now=0.0) == math.inf
    governor.land(fault("rate limit"), sent=0.0, now=1.0)
    assert governor.limit.now == 1 and governor.wait(5, now=1.0) == math.inf
    governor.land(None, sent=0.0, now=1.0)
    governor.quiet(20.0, now=1.0)
    governor.quiet(3.0, now=2.0)  # the longest one holds
    assert governor.wait(5, now=4.0) == 17.0
    governor = Governor(concurrency=9, per_minute=(60, 600), patience=PATIENCE)
    governor.admit(10, now=0.0)
    assert governor.wait(1, now=0.0) == pytest.approx(1.0, rel=0.02)
    governor.withdraw(10, now=0.0)
    assert governor.wait(10, now=0.0) == 0.0 and governor.in_flight == 0
    governor.admit(10, now=0.0)
    assert governor.wait(10, now=0.0) > governor.wait(1, now=0.0) - 1e-9
    governor.land(None, sent=0.0, now=1.0, unused_tokens=10)
    assert governor.wait(10, now=1.1) == 0.0
