"""The Batch API: what finished is kept, the rest is handed in again, nothing is paid twice."""

import asyncio
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from batch_server import (
    Behaviour,
    Ends,
    Row,
    all_good,
    answered,
    batch_server,
    refused,
)
from fault_server import choice, error, fault_server, good
from paid_lesson import QUICK

from distill_jax.config import TeacherConfig
from distill_jax.teacher.account import Ask
from distill_jax.teacher.audit import read_totals, verify
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.dialect import Dialect
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.reply import (
    BudgetReached,
    CredentialsRefused,
    Interrupted,
    QuotaExhausted,
    RequestRefused,
    TeacherError,
    TeacherUnavailable,
)

PRICED: dict[str, Any] = {"price_usd": (10.0, 10.0), "budget_usd": 1.0}
COST = (50 + 20) * 10 / 1e6  # of a prompt with two answers


def client(path: Path, ledger: Ledger, url: str, **changes) -> TeacherClient:
    knobs = {"url": "http://x/v1", "model": "m", "samples": 2, "mode": "batch"}
    config = TeacherConfig.model_validate(knobs | changes)
    made = TeacherClient(config, ledger, url=url, free=True, patience=QUICK)
    made._account.endpoint = "http://x/v1"  # the server has another port each time
    return made


def asks(number: int) -> list[Ask]:
    return [Ask(f"p{i}", (0, 1)) for i in range(number)]


def run(path: Path, behave: Behaviour, number: int = 5, *, server=None, **changes):
    """Texts and sent batches, or the error and sent batches."""
    with batch_server(behave, **(server or {})) as (state, url), Ledger(path) as ledger:
        try:
            rows = client(path, ledger, url, **changes).complete(asks(number))
            return [[c.text for c in row] for row in rows], state
        except TeacherError as raised:
            return raised, state


def texts(number: int) -> list[list[str]]:
    return [[f"answer {k} to p{i}" for k in range(2)] for i in range(number)]


def prompts(rows: list[Row]) -> list[str]:
    return [row["body"]["messages"][0]["content"] for row in rows]


def test_answers_by_custom_id_whatever_their_order(tmp_path: Path):
    path = tmp_path / "l"
    got, state = run(path, all_good, **PRICED)
    assert got == texts(5)
    (rows,) = state.rows
    assert prompts(rows) == [f"p{i}" for i in range(5)]
    assert {row["url"] for row in rows} == {"/v1/chat/completions"}
    assert rows[0]["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "p0"}],
        "n": 2,
        "temperature": 1.0,
        "top_p": 0.9,
        "max_tokens": 128,
    }
    totals = read_totals(path)
    assert (totals.num_answers, totals.num_open) == (5, 0)
    assert totals.spent_usd == pytest.approx(5 * COST)
    # the same requests by chat: all there
    with fault_server(good) as (chat_server, url), Ledger(path) as ledger:
        rows = client(path, ledger, url, mode="chat", **PRICED).complete(asks(6))
    assert [[c.text for c in row] for row in rows] == texts(6)
    assert chat_server.prompts == ["p5"]


def expired_first(number: int, rows: list[Row]) -> Ends:
    if number:
        return all_good(number, rows)
    lost = {"code": "batch_expired", "message": "too late"}
    errors = [{"custom_id": row["custom_id"], "response": None, "error": lost} for row in rows[3:4]]
    return Ends("expired", tuple(answered(row) for row in rows[:3]), tuple(errors))


def failed_validation_first(number: int, rows: list[Row]) -> Ends:
    return all_good(number, rows) if number else Ends("failed", problem="the file is not valid")


def error_file_only_first(number: int, rows: list[Row]) -> Ends:
    overloaded = {"error": {"message": "busy", "code": "overloaded"}}
    errors = tuple(refused(row, 503, overloaded) for row in rows)
    return all_good(number, rows) if number else Ends("completed", errors=errors)


def told_twice_and_strangers(number: int, rows: list[Row]) -> Ends:
    first = [answered(row) for row in rows]
    again = [answered(row, choices=[{"message": {"content": "x"}}] * 2) for row in rows]
    stranger = answered({**rows[0], "custom_id": "request-17"})
    return Ends(output=(stranger, *first, *again))


def some_missing_first(number: int, rows: list[Row]) -> Ends:
    return all_good(number, rows[number == 0 and 2 :])


def cancelled_first(number: int, rows: list[Row]) -> Ends:
    return all_good(number, rows) if number else Ends("cancelled", (answered(rows[4]),))


def empty_body_first(number: int, rows: list[Row]) -> Ends:
    empty = tuple(answered(row, choices=None) for row in rows)
    return all_good(number, rows) if number else Ends(output=empty)


@pytest.mark.parametrize(
    ("behave", "sent", "cost"),
    [
        (expired_first, [5, 2], 5 * COST),
        (failed_validation_first, [5, 5], 5 * COST),
        (error_file_only_first, [5, 5], 5 * COST),
        (told_twice_and_strangers, [5], 5 * COST),
        (cancelled_first, [5, 4], 5 * COST),
        # a completed batch doesn't say what became of the lines that it lacks: possibly paid
        (some_missing_first, [5, 2], 5 * COST + 2 * (2 + 64 + 256) * 10 / 1e6),
        (empty_body_first, [5, 5], 10 * COST),
    ],
)
def test_33_what_finished_is_kept_and_the_rest_handed_in_again(
    tmp_path: Path, behave: Behaviour, sent: list[int], cost: float
):
    got, state = run(tmp_path / "l", behave, **PRICED)
    assert got == texts(5)
    assert [len(rows) for rows in state.rows] == sent
    totals = read_totals(tmp_path / "l")
    assert (totals.num_answers, totals.num_open) == (5, 0)
    assert totals.spent_usd == pytest.approx(cost)


def expired_line_by_line(number: int, rows: list[Row]) -> Ends:
    lost = {"code": "batch_expired", "message": "too late"}
    lines = [{"custom_id": row["custom_id"], "response": None, "error": lost} for row in rows]
    return Ends("expired", errors=tuple(lines))


@pytest.mark.parametrize("behave", [expired_line_by_line, lambda *_: Ends("failed")])
def test_batches_that_come_to_nothing_never_give_a_prompt_up(tmp_path: Path, behave: Behaviour):
    for _ in range(QUICK.attempts):  # in each process three
        got, _ = run(tmp_path / "l", behave, number=1)
        assert isinstance(got, TeacherUnavailable)
    assert run(tmp_path / "l", all_good, number=1)[0] == texts(1)


def test_half_a_character_in_an_answer_is_no_end(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        return Ends(output=(answered(rows[0], choices=[choice("\ud83d"), choice("字")]),))

    assert run(tmp_path / "l", behave, number=1)[0] == [["?", "字"]]
    assert verify(tmp_path / "l") == []


def test_batches_that_bring_nothing_end_the_run(tmp_path: Path):
    got, state = run(tmp_path / "l", lambda *_: Ends("expired"), **PRICED)
    assert isinstance(got, TeacherUnavailable) and "3 batches in a row" in str(got)
    assert len(state.rows) == 3 and read_totals(tmp_path / "l").spent_usd == 0.0


def test_a_prompt_that_always_fails_is_told(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        bad = [row for row in rows if prompts([row]) == ["p2"]]
        lines = [answered(row) for row in rows if row not in bad]
        return Ends(output=(*lines, *(refused(row, 500, {}) for row in bad)))

    got, state = run(tmp_path / "l", behave)
    assert got == [*texts(2), ["", ""], *texts(5)[3:]]
    assert [len(rows) for rows in state.rows] == [5, *[1] * (QUICK.attempts - 1)]


def test_a_prompt_is_counted_once_in_a_batch_however_many_lines_it_has(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        return (
            all_good(number, rows)
            if number
            else Ends(errors=tuple(refused(r, 500, {}) for r in rows))
        )

    path, samples = tmp_path / "l", 3 * QUICK.attempts  # as many as all processes may try
    with Ledger(path) as ledger, batch_server(behave) as (state, url):
        made = client(path, ledger, url, samples=samples)
        made._account.speak(ledger, Dialect(one_by_one=True))
        (row,) = made.complete([Ask("p", tuple(range(samples)))])
    assert {c.text for c in row} == {"answer 0 to p"}
    assert [len(rows) for rows in state.rows] == [samples] * 2


def test_each_thing_learned_from_a_batch_is_worth_another(tmp_path: Path):
    unknown = ("max_tokens", "temperature", "top_p", "n")  # told one at a time

    def behave(number: int, rows: list[Row]) -> Ends:
        for name in unknown:
            if name in rows[0]["body"]:
                problem = {"error": {"message": f"Unsupported: '{name}'", "param": name}}
                return Ends(errors=tuple(refused(row, 400, problem) for row in rows))
        return all_good(number, rows)

    assert len(unknown) >= QUICK.attempts > QUICK.bad_answers
    got, state = run(tmp_path / "l", behave, number=2)
    assert got == [["answer 0 to p0"] * 2, ["answer 0 to p1"] * 2]
    assert [len(rows) for rows in state.rows] == [2, 2, 2, 2, 4]


def test_another_dialect_is_learned_from_a_batch(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        if "max_tokens" in rows[0]["body"]:
            problem = {"message": "unsupported", "param": "max_tokens"}
            return Ends(errors=tuple(refused(row, 400, {"error": problem}) for row in rows))
        return all_good(number, rows)

    with batch_server(behave) as (state, url):
        for number in (5, 6):
            with Ledger(tmp_path / "l") as ledger:
                config = TeacherConfig(url=url, model="m", samples=2, mode="batch")
                made = TeacherClient(config, ledger, url=url, free=True, patience=QUICK)
                rows = made.complete(asks(number))
            assert [[c.text for c in row] for row in rows] == texts(number)
    names = ["max_completion_tokens" in rows[0]["body"] for rows in state.rows]
    assert names == [False, True, True]  # remembered by the second client


def test_a_quota_that_is_gone_ends_it_after_the_rest_is_booked(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        empty = {"error": {"message": "no", "code": "insufficient_quota"}}
        lines = (refused(rows[0], 429, empty), *(answered(row) for row in rows[1:]))
        return Ends(output=lines)

    got, _ = run(tmp_path / "l", behave)
    assert isinstance(got, QuotaExhausted)
    assert read_totals(tmp_path / "l").num_answers == 4


def test_only_what_the_budget_allows_is_handed_in(tmp_path: Path):
    worst = (2 + 64 + 256) * 10 / 1e6
    limit = worst + 2.5 * COST
    tight: dict[str, Any] = PRICED | {"budget_usd": limit}
    got, state = run(tmp_path / "l", all_good, **tight)
    # one fits at its worst; once its real cost is known another does, until none does
    assert isinstance(got, BudgetReached)
    assert [len(rows) for rows in state.rows] == [1, 1, 1]
    assert read_totals(tmp_path / "l").spent_usd <= limit


def interrupted(path: Path, behave: Behaviour, url: str) -> None:
    def advance(amount: int, detail: str) -> None:
        if "in a batch" in detail:
            raise asyncio.CancelledError

    with Ledger(path) as ledger, pytest.raises(KeyboardInterrupt):
        client(path, ledger, url, **PRICED).complete(asks(5), advance=advance)


def test_a_batch_that_is_out_is_collected_by_chat_too(tmp_path: Path, caplog):
    path = tmp_path / "l"
    with batch_server(all_good, polls=2) as (state, url):
        interrupted(path, all_good, url)
        with Ledger(path) as ledger:
            rows = client(path, ledger, url, mode="chat", **PRICED).complete(asks(5))
    assert [[c.text for c in row] for row in rows] == texts(5)
    assert read_totals(path).spent_usd == pytest.approx(5 * COST)
    assert "batch batch_0 first" in caplog.text
    assert len(state.rows) == 1  # and this server can do nothing else


def test_an_interrupt_while_chat_collects_a_batch_is_heard(tmp_path: Path):
    path = tmp_path / "l"

    def interrupt(number: int, rows: list[Row]) -> Ends:
        os.kill(os.getpid(), signal.SIGINT)
        return all_good(number, rows)

    with batch_server(interrupt, polls=2) as (_, url):
        interrupted(path, all_good, url)
        with Ledger(path) as ledger, pytest.raises(Interrupted):
            client(path, ledger, url, mode="chat", **PRICED).complete(asks(6))
    totals = read_totals(path)
    assert totals.num_requests == totals.num_answers == 5


@pytest.mark.parametrize("recorded", [True, False])
def test_a_batch_of_a_former_process_is_found_again(tmp_path: Path, recorded: bool):
    path = tmp_path / "l"
    with batch_server(all_good, polls=2) as (state, url):
        interrupted(path, all_good, url)
        assert read_totals(path).num_open == 5
        if not recorded:  # as if it had died before it could write down the batch's name
            with sqlite3.connect(path) as database:
                database.execute("UPDATE batches SET remote = NULL")
            database.close()
        with Ledger(path) as ledger:
            rows = client(path, ledger, url, **PRICED).complete(asks(6))
    assert [[c.text for c in row] for row in rows] == texts(6)
    assert [prompts(rows) for rows in state.rows] == [[f"p{i}" for i in range(5)], ["p5"]]


def test_05_a_key_that_is_replaced_while_a_batch_is_out_is_read_again(tmp_path: Path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("old-key-12345678")
    path.chmod(0o600)
    monkeypatch.setenv("FRESH_FILE", str(path))

    def replace_key(amount: int, detail: str) -> None:
        if "in a batch" in detail:
            state.key = "new-key-12345678"
            path.write_text(state.key)

    with batch_server(all_good) as (state, url), Ledger(tmp_path / "l") as ledger:
        made = client(tmp_path / "l", ledger, url, api_key_env="FRESH")
        rows = made.complete(asks(5), advance=replace_key)
    assert [[c.text for c in row] for row in rows] == texts(5) and len(state.batches) == 1


def test_05_a_key_that_is_another_each_time_is_read_again_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FRESH_COMMAND", "date +old-key-1234-%s%N")
    with batch_server(all_good) as (state, url), Ledger(tmp_path / "l") as ledger:
        state.key = "another"
        made = client(tmp_path / "l", ledger, url, api_key_env="FRESH")
        with pytest.raises(CredentialsRefused):
            made.complete(asks(1))
        assert not state.batches


def test_a_batch_that_was_never_handed_in_costs_nothing(tmp_path: Path):
    path = tmp_path / "l"
    with batch_server(all_good, polls=2) as (_, url):
        interrupted(path, all_good, url)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE batches SET remote = NULL")
    database.close()
    whole = path.read_bytes()
    got, state = run(path, all_good, **PRICED)  # a server that knows of nothing
    assert got == texts(5) and len(state.rows) == 1
    assert read_totals(path).spent_usd == pytest.approx(5 * COST)
    path.write_bytes(whole)
    with fault_server(good) as (_, url), Ledger(path) as ledger:  # and one without a Batch API
        rows = client(path, ledger, url, mode="chat", **PRICED).complete(asks(5))
        assert [[c.text for c in row] for row in rows] == texts(5)
        assert ledger.spent_usd == pytest.approx(5 * COST)


def test_a_batch_made_without_an_answer_is_not_made_twice(tmp_path: Path):
    got, state = run(tmp_path / "l", all_good, server={"reset_create": 2})
    assert got == texts(5) and len(state.rows) == 1


def test_a_server_without_a_batch_api_is_named(tmp_path: Path):
    with fault_server(lambda _: error(404)) as (_, url), Ledger(tmp_path / "l") as ledger:
        with pytest.raises(RequestRefused, match=r"teacher\.mode=chat works without"):
            client(tmp_path / "l", ledger, url, **PRICED).complete(asks(2))
        assert ledger.spent_usd == 0.0
    with pytest.raises(ValueError, match="the tutor has no Batch API"), Ledger(tmp_path / "l") as t:
        TeacherClient(TeacherConfig(mode="batch"), t, url="http://x", free=True)


def test_one_by_one_means_a_line_for_each_sample(tmp_path: Path):
    def behave(number: int, rows: list[Row]) -> Ends:
        if "n" in rows[0]["body"]:
            problem = {"error": {"message": "Unsupported parameter 'n'", "param": "n"}}
            return Ends(output=tuple(refused(row, 400, problem) for row in rows))
        return all_good(number, rows)

    got, state = run(tmp_path / "l", behave, number=2)
    assert got == [["answer 0 to p0"] * 2, ["answer 0 to p1"] * 2]
    assert [len(rows) for rows in state.rows] == [2, 4]
    assert json.dumps(state.rows[1]).count('"n"') == 0
