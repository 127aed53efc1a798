"""Killed or interrupted at any moment: what was paid is kept, nothing answered is asked again."""

import signal
import time
from functools import partial
from pathlib import Path

import pytest
from fault_server import fault_server
from paid_lesson import (
    CONCURRENCY,
    answered_prompts,
    fails_once,
    start,
    sum_up,
    survive,
    teach,
    told_right,
    wait_for_calls,
)

from distill_jax.teacher.audit import read_totals


def test_killed_in_mid_lesson_nothing_answered_is_asked_again(tmp_path: Path):
    path, size = tmp_path / "ledger.sqlite", 200
    with fault_server(sum_up) as (server, url):
        process = start(path, url, size)
        assert wait_for_calls(server, process, 90)
        process.kill()
        process.communicate()
        time.sleep(0.1)  # what was on its way to the server has arrived
        answered = answered_prompts(path)
        before = server.prompts
        assert 0 < len(answered) < len(before) < size
        lesson = teach(path, url, size)
        after = server.prompts[len(before) :]
    assert lesson == told_right(size)
    assert not set(after) & answered
    assert set(after) | answered == {f"{i} + 1?" for i in range(size)}
    asked_in_full = {prompt for prompt in before if not fails_once(prompt)}
    assert len(asked_in_full & set(after)) <= CONCURRENCY  # at most what was in flight, twice


def test_many_kills_at_random_moments(tmp_path: Path):
    """The long form is a command: python tests/paid_lesson.py survive-kills."""
    seen = survive(tmp_path / "ledger.sqlite", size=120, kills=6, seed=7)
    assert seen["kills"] == 6 and seen["same_rows"]
    assert seen["asked_again"] == 0
    assert seen["most_paid_twice"] <= CONCURRENCY
    assert seen["paid_twice"] == seen["answers"] - 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_lets_what_is_in_flight_come_home(tmp_path: Path, number: int):
    path, size = tmp_path / "ledger.sqlite", 60
    with fault_server(partial(sum_up, delay_s=0.5)) as (server, url):
        process = start(path, url, size)
        assert wait_for_calls(server, process, 12)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        asked, totals = len(server.calls), read_totals(path)
    assert process.returncode == 14, err
    assert "what they bring is kept" in err and "the same command goes on from here" in err
    assert "Traceback" not in err
    assert totals.num_open == 0 and totals.num_answers + totals.num_failures == asked < size


def test_the_second_interrupt_stops_at_once(tmp_path: Path):
    path, size = tmp_path / "ledger.sqlite", 60
    with fault_server(partial(sum_up, delay_s=3.0)) as (server, url):
        process = start(path, url, size)
        assert wait_for_calls(server, process, CONCURRENCY + 1)  # one of them is refused first
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "8 requests are on their way" in process.stderr.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - begun < 1.5  # the server takes 3 seconds
    assert process.returncode == 14 and "Traceback" not in err, err
    totals = read_totals(path)
    assert totals.num_open == CONCURRENCY and totals.num_answers == 0  # possibly paid
