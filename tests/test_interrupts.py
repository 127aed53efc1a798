"""Killed or interrupted at any moment: what was paid is kept, nothing answered is asked again."""

import json
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
from fault_server import FaultServer, fault_server
from paid_lesson import CONCURRENCY, fails_once, start, sum_up, teach, told_right

from distill_jax.teacher.audit import read_totals


def wait_for_calls(server: FaultServer, process: subprocess.Popen, number: int) -> None:
    while len(server.calls) < number:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.002)


def answered_prompts(path: Path) -> set[str]:
    database = sqlite3.connect(path)
    rows = database.execute("SELECT request FROM answers JOIN requests USING (key)").fetchall()
    database.close()
    return {json.loads(row)["body"]["messages"][0]["content"] for (row,) in rows}


def test_killed_in_mid_lesson_nothing_answered_is_asked_again(tmp_path: Path):
    path, size = tmp_path / "ledger.sqlite", 200
    with fault_server(sum_up) as (server, url):
        process = start(path, url, size)
        wait_for_calls(server, process, 90)
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
    """The short form of scripts/kill_teacher.py."""
    path, size, random, kills = tmp_path / "ledger.sqlite", 120, Random(7), 0
    with fault_server(sum_up) as (server, url):
        while (process := start(path, url, size)) and kills < 6:
            begun = len(server.calls)
            wait_for_calls(server, process, begun + random.randint(1, 15))
            time.sleep(random.uniform(0.0, 0.03))
            process.kill()
            process.communicate()
            kills += 1
        process.communicate()
        assert process.returncode == 0
        served = Counter(prompt for prompt in server.prompts if not fails_once(prompt))
        lesson = teach(path, url, size)
    assert lesson == told_right(size)
    assert sum(count - 1 for count in served.values()) <= kills * CONCURRENCY
    assert read_totals(path).num_answers == size


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_lets_what_is_in_flight_come_home(tmp_path: Path, number: int):
    path, size = tmp_path / "ledger.sqlite", 60
    with fault_server(partial(sum_up, delay_s=0.5)) as (server, url):
        process = start(path, url, size)
        wait_for_calls(server, process, 12)
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
        wait_for_calls(server, process, CONCURRENCY + 1)  # one of them is refused first
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
