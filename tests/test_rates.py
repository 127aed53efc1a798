"""The governor at work: what a server is spared, how fast it is asked again, and what clocks do."""

import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from asked import CENT_PER_THOUSAND, Outcome
from fault_server import Call, Says, chat, error, good
from paid_lesson import QUICK

from distill_jax.teacher.reply import TeacherUnavailable


def names(number: int) -> list[str]:
    return [f"p{i}" for i in range(number)]


def all_answered(out: Outcome) -> bool:
    return all(c.finish_reason == "stop" for row in out.answers for c in row)


@pytest.mark.parametrize("headers", [{}, {"retry_after_ms": "50"}], ids=["no header", "header"])
def test_02_a_burst_of_50_refusals_loses_nothing_and_the_pace_comes_back(
    tmp_path: Path, headers: dict
):
    def behave(call: Call) -> Says:
        if call.number < 50:
            time.sleep(0.1)  # all 50 are on their way
            return error(429, **headers)
        return Says(body=chat(call), delay_s=0.01)

    prompts = names(200)
    out = Outcome(tmp_path, behave, prompts, concurrency=50)
    assert all_answered(out) and len(out.server.calls) == 250
    assert Counter(out.server.prompts) == Counter(prompts) + Counter(prompts[:50])
    sent = sorted(call.at for call in out.server.calls[50:])
    assert out.server.calls[50].at - out.server.calls[49].at > 0.05
    assert len(sent) == 200


def test_01_the_limit_finds_what_a_server_takes(tmp_path: Path):
    lock, now = threading.Lock(), [0]

    def behave(call: Call) -> Says:
        with lock:
            now[0] += 1
            busy = now[0] > 6
        try:
            if busy:
                return error(429, retry_after_ms="20")
            time.sleep(0.02)
            return good(call)
        finally:
            with lock:
                now[0] -= 1

    out = Outcome(tmp_path, behave, names(150), concurrency=40)
    assert all_answered(out)
    refused = len(out.server.calls) - 150
    assert refused < 120  # 40 at once at first; then the limit stays near 6


@pytest.mark.parametrize(("seconds", "waits"), [("0.3", True), ("0.7", False)])
def test_03_a_long_wait_is_granted_up_to_a_limit(tmp_path: Path, seconds: str, waits: bool):
    patience = replace(QUICK, longest_retry_after_s=0.5)
    out = Outcome(
        tmp_path,
        lambda call: good(call) if call.again else error(429, retry_after=seconds),
        ["p"],
        patience=patience,
    )
    if waits:
        first, second = out.server.calls
        assert all_answered(out) and second.at - first.at >= 0.3
    else:
        assert isinstance(out.raised, TeacherUnavailable) and out.raised.exit_code == 14
        assert "asks to wait 1 seconds" in str(out.raised)


def test_08_a_server_in_trouble_is_left_alone_and_then_asked_again(tmp_path: Path):
    begun = time.monotonic()

    def behave(call: Call) -> Says:
        return error(503) if call.at - begun < 1.2 else good(call)

    patience = replace(QUICK, cool_down_s=0.2, outage_s=10.0, attempts=6)
    out = Outcome(tmp_path, behave, names(60), concurrency=16, patience=patience)
    assert all_answered(out)
    during = [call for call in out.server.calls if call.at - begun < 1.2]
    assert len(during) <= 16 + 5  # those on their way when it opened, and a few probes


def test_08_a_server_that_stays_in_trouble_ends_the_run(tmp_path: Path):
    patience = replace(QUICK, outage_s=0.5, attempts=1000)
    out = Outcome(tmp_path, lambda _: error(500), names(50), concurrency=8, patience=patience)
    assert isinstance(out.raised, TeacherUnavailable)
    assert "failing for too long" in str(out.raised) and out.totals.num_open == 0
    assert len(out.server.calls) < 40


def test_11_silence_is_a_timeout_that_may_have_been_billed(tmp_path: Path):
    def behave(call: Call) -> Says:
        return Says(body=chat(call), delay_s=0.0 if call.again else 0.8)

    patience = replace(QUICK, read_s=0.2)
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0}
    out = Outcome(tmp_path, behave, ["c"], patience=patience, **priced)
    assert all_answered(out) and len(out.server.calls) == 2
    worst, real = (1 + 64 + 2 * 128) * 10 / 1e6, (50 + 20) * 10 / 1e6
    assert out.totals.spent_usd == pytest.approx(worst + real)


def test_27_steps_of_the_wall_clock_change_nothing(tmp_path: Path, monkeypatch):
    true_time, steps = time.time, [0]

    def stepping() -> float:  # an hour forth or back at every look
        steps[0] += 1
        return true_time() + 3600.0 * (-1) ** steps[0]

    monkeypatch.setattr(time, "time", stepping)

    def behave(call: Call) -> Says:
        if call.again:
            return good(call)
        now = true_time() + 86400.0  # its own clock is a day ahead
        dates = {"retry_after": formatdate(now + 1.0, usegmt=True), "date": formatdate(now)}
        return error(429, **dates)

    begun = time.monotonic()
    out = Outcome(tmp_path, behave, names(4), per_minute=(600, 0))
    assert all_answered(out) and steps[0] > 8
    assert 1.0 <= time.monotonic() - begun < 4.0


def test_requests_per_minute_are_kept(tmp_path: Path):
    begun = time.monotonic()
    out = Outcome(tmp_path, good, names(60), per_minute=(1200, 0))
    assert all_answered(out)
    assert time.monotonic() - begun > 1.9  # 20 may go out at once, then 20 a second


def test_tokens_per_minute_are_kept(tmp_path: Path):
    # a request is taken for 64 + 2 * 128 tokens and more; 70 are used, the rest is given back:
    # 1,000 tokens a second are enough for 40 requests in about 3 seconds, else they take 12
    begun = time.monotonic()
    out = Outcome(tmp_path, good, names(40), per_minute=(0, 60_000))
    assert all_answered(out)
    assert 1.5 < time.monotonic() - begun < 10.0


def test_29_more_tokens_than_a_minute_has_are_refused_before_anything_is_sent(tmp_path: Path):
    with pytest.raises(ValueError, match=r"may take 320 tokens.*per_minute lets 300 through"):
        Outcome(tmp_path, good, ["p"], per_minute=(0, 300))
