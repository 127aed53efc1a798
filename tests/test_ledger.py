"""The ledger: nothing is lost, nothing is asked twice, nothing is spent beyond the budget."""

import errno
import json
import sqlite3
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.teacher.audit import read_totals
from distill_jax.teacher.ledger import Ledger, canonical, request_key

NANO = Fraction(1, 10**9)


def ask(prompt: str) -> dict:
    return {"endpoint": "e", "body": {"model": "m", "messages": [prompt], "top_p": 0.9}}


def reserve(ledger: Ledger, prompt: str = "p", *, usd: float = 0.0) -> int:
    intent = ledger.reserve(ask(prompt), [0, 1], usd=usd, limit_usd=None)
    assert intent is not None
    return intent


def reserve_within(ledger: Ledger, prompt: str, usd: float, limit: float) -> int | None:
    return ledger.reserve(ask(prompt), [0, 1], usd=usd, limit_usd=limit)


def settle(ledger: Ledger, intent: int, usd: float | None) -> None:
    ledger.settle(intent, usd=usd, served_model="m", usage=None, finish_reasons=["stop"])


def test_key_covers_every_part_and_no_order():
    base = {
        "endpoint": "e",
        "api": "a",
        "prompt_version": "1",
        "body": {"model": "m", "top_p": 0.9},
    }
    keys = {request_key(base)}
    for change in (
        {"endpoint": "f"},
        {"api": "b"},
        {"prompt_version": "2"},
        {"body": {"model": "n", "top_p": 0.9}},
        {"body": {"model": "m", "top_p": 0.8}},
        {"body": {"model": "m", "top_p": 0.9, "seed": None}},
    ):
        keys.add(request_key(base | change))
    assert len(keys) == 7
    assert request_key(dict(reversed(base.items()))) == request_key(base)
    with pytest.raises(ValueError):
        canonical({"temperature": float("nan")})


def test_answer_is_on_disk_unread_and_survives_without_close(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    intent = reserve(ledger, usd=0.5)
    ledger.store(intent, "<not even JSON>", attempts=2, latency_s=0.1)
    with Ledger(path) as other:  # another connection: only what was committed is seen
        (stored,) = other.answers(request_key(ask("p")))
        assert (stored.intent, stored.slots, stored.raw) == (intent, (0, 1), "<not even JSON>")
        assert not stored.settled
        assert other.spent_usd == 0.5
        assert other.answers(request_key(ask("q"))) == []
    settle(ledger, intent, 0.125)
    assert ledger.spent_usd == 0.125
    assert ledger.answers(request_key(ask("p")))[0].settled
    ledger.close()


def test_commits_reach_the_disk(tmp_path: Path):
    with Ledger(tmp_path / "l") as ledger:
        database = ledger.database
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_totals(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        answered, failed, lost, _open = (reserve(ledger, p, usd=0.25) for p in "abcd")
        ledger.store(answered, "{}", attempts=1, latency_s=0.1)
        settle(ledger, answered, 0.0625)
        ledger.fail(failed, "server error", "500", usd=0.0)
        ledger.fail(lost, "connection", "reset", usd=None)
        totals = read_totals(path)
    assert totals.spent_usd == 0.0625 + 0.25 + 0.25
    assert totals.open_usd == 0.25
    assert (totals.num_requests, totals.num_answers) == (4, 1)
    assert (totals.num_failures, totals.num_open) == (2, 1)


def test_an_answer_that_is_none_moves_to_the_failures(tmp_path: Path):
    with Ledger(tmp_path / "l") as ledger:
        intent = reserve(ledger)
        ledger.store(intent, "<html>", attempts=1, latency_s=0.1)
        ledger.fail(intent, "bad answer", "<html>", usd=None)
        assert ledger.answers(request_key(ask("p"))) == []
        rows = ledger.database.execute("SELECT kind, detail FROM failures").fetchall()
        assert rows == [("bad answer", "<html>")]


def test_closing_an_intent_twice_is_a_bug(tmp_path: Path):
    with Ledger(tmp_path / "l") as ledger:
        intent = reserve(ledger, usd=1.0)
        ledger.fail(intent, "timeout", "", usd=0.0)
        with pytest.raises(AssertionError, match="already closed"):
            ledger.fail(intent, "timeout", "", usd=0.0)
        assert ledger.spent_usd == 0.0


@settings(max_examples=20, deadline=None)
@given(
    limit=st.integers(0, 5000),
    steps=st.lists(st.tuples(st.integers(0, 2000), st.sampled_from("rsfx"), st.floats(0, 1))),
)
def test_budget_agrees_with_exact_bookkeeping(tmp_path_factory, limit, steps):
    path = tmp_path_factory.mktemp("budget") / "l"
    spent, pending = Fraction(0), []
    with Ledger(path) as ledger:
        for cost, action, share in steps:
            if action == "r":
                intent = reserve_within(ledger, "p", cost / 1000, limit / 1000)
                fits = spent + Fraction(cost, 1000) <= Fraction(limit, 1000)
                assert (intent is not None) == fits
                if fits:
                    spent += Fraction(cost, 1000)
                    pending.append((intent, cost))
            elif pending:
                intent, cost = pending.pop(0)
                real = None if action == "x" else int(cost * share) / 1000
                if action == "s":
                    ledger.store(intent, "{}", attempts=1, latency_s=0.0)
                    settle(ledger, intent, real)
                else:
                    ledger.fail(intent, "timeout", "", usd=real)
                if real is not None:
                    spent += Fraction(int(cost * share), 1000) - Fraction(cost, 1000)
            assert abs(Fraction(ledger.spent_usd) - spent) <= len(steps) * NANO
            assert ledger.spent_usd <= limit / 1000
    assert read_totals(path).spent_usd == pytest.approx(float(spent), abs=1e-6)


def test_budget_holds_when_threads_compete(tmp_path: Path):
    path, limit, seen, accepted = tmp_path / "l", 1.0, [], []
    Ledger(path).close()

    def spend(seed: int) -> None:
        random = Random(seed)
        with Ledger(path) as ledger:
            for i in range(25):
                most = random.uniform(0, 0.2)
                intent = reserve_within(ledger, f"{seed} {i}", most, limit)
                seen.append(ledger.spent_usd)
                if intent is not None:
                    accepted.append(intent)
                    if random.random() < 0.8:
                        ledger.fail(intent, "timeout", "", usd=most * random.uniform(0, 0.1))

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200 and len(set(accepted)) == len(accepted) < 200
    assert max(seen) <= limit
    assert limit - 0.2 < read_totals(path).spent_usd <= limit


def test_a_killed_process_leaves_its_intents_spent(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from distill_jax.teacher.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for i in range(3):\n"
        "    intent = ledger.reserve({'p': i}, [0], usd=0.25, limit_usd=1.0)\n"
        "ledger.store(intent, 'raw', attempts=1, latency_s=0.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    with Ledger(path) as ledger:
        assert ledger.spent_usd == 0.75
        assert ledger.answers(request_key({"p": 2}))[0].raw == "raw"
        assert ledger.reserve({"p": 9}, [0], usd=0.26, limit_usd=1.0) is None
        assert ledger.reserve({"p": 9}, [0], usd=0.25, limit_usd=1.0) is not None
    assert read_totals(path).num_open == 4


def test_foreign_files_are_left_alone(tmp_path: Path):
    other = tmp_path / "other"
    other.write_text("hello " * 1000)
    with pytest.raises(ValueError, match="is not a ledger"):
        Ledger(other)
    assert other.read_text() == "hello " * 1000
    newer = tmp_path / "newer"
    with Ledger(newer) as ledger:
        ledger.database.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="schema 99; this version reads 2"):
        Ledger(newer)
    with pytest.raises(FileNotFoundError, match="there is no ledger"):
        read_totals(tmp_path / "absent")


def test_a_full_disk_is_an_error_of_the_disk_and_loses_nothing(tmp_path: Path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        pages = ledger.database.execute("PRAGMA page_count").fetchone()[0]
        ledger.database.execute(f"PRAGMA max_page_count = {pages + 3}")
        stored = 0
        with pytest.raises(OSError, match="can't be written") as caught:
            while True:
                intent = reserve(ledger, f"{stored}")
                ledger.store(intent, "x" * 3000, attempts=1, latency_s=0.0)
                stored += 1
        assert caught.value.errno == errno.ENOSPC
    assert stored > 0
    with Ledger(path) as ledger:  # more room again
        assert len(ledger.answers(request_key(ask("0")))) == 1
        assert read_totals(path).num_answers == stored
        assert reserve(ledger, "next") > 0


def test_everything_in_the_file_is_text(tmp_path: Path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        intent = reserve(ledger)
        ledger.store(intent, '{"a": "\\u00e9"}', attempts=1, latency_s=0.5)
        settle(ledger, intent, 0.0)
    database = sqlite3.connect(path)
    (request,) = database.execute("SELECT request FROM requests").fetchone()
    kinds = database.execute("SELECT typeof(raw), typeof(usage), typeof(slots) FROM answers")
    assert kinds.fetchone() == ("text", "text", "text")
    assert json.loads(request) == ask("p")
    database.close()
