"""The client against a server that misbehaves: what is asked, what is kept, what it may cost."""

import json
import logging
import sqlite3
import time
from collections import Counter

import pytest
from asked import CENT_PER_THOUSAND, KEY, Outcome, asks, config
from fault_server import (
    Call,
    Says,
    chat,
    choice,
    error,
    fault_server,
    first_then_good,
    good,
)
from paid_lesson import QUICK

from distill_jax.teacher.audit import read_rows, verify
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.governor import Patience
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.reply import (
    BudgetReached,
    CredentialsRefused,
    QuotaExhausted,
    RequestRefused,
    TeacherUnavailable,
    retry_after,
)


def test_answers_in_order_each_asked_once(tmp_path):
    prompts = [f"p{i % 7}" for i in range(10)]  # three of them twice
    out = Outcome(tmp_path, good, prompts, url="tutor")
    assert out.texts == [[f"answer 0 to {p}", f"answer 1 to {p}"] for p in prompts]
    assert {c.finish_reason for row in out.answers for c in row} == {"stop"}
    assert {c.num_tokens for row in out.answers for c in row} == {10}
    assert Counter(out.server.prompts) == Counter(set(prompts))
    body = dict(next(call for call in out.server.calls if call.prompt == "p3").body)
    assert body.pop("messages") == [{"role": "user", "content": "p3"}]
    assert body == {"model": "m", "n": 2, "temperature": 1.0, "top_p": 0.9, "max_tokens": 128}
    # the tutor has another port at every start, and still nothing is asked twice
    more = out.again(good, ["new", *prompts], url="tutor")
    assert more.server.prompts == ["new"] and more.texts[1:] == out.texts
    assert out.again(good, ["p1"], url="tutor", temperature=0.5).server.prompts == ["p1"]


def test_progress_counts_every_prompt(tmp_path):
    told = []
    with fault_server(good) as (_, url), Ledger(tmp_path / "l") as ledger:
        client = TeacherClient(config(), ledger, url=url, free=True, patience=QUICK)
        client.complete(asks(["a", "b"]))
        client.complete(
            asks(["a", "c", "b", "c"]), advance=lambda amount, detail: told.append(amount)
        )
    assert sum(told) == 4


def test_concurrency_is_bounded(tmp_path):
    def slowly(call: Call) -> Says:
        return Says(body=chat(call), delay_s=0.05)

    out = Outcome(tmp_path, slowly, [f"p{i}" for i in range(20)], concurrency=3)
    assert out.server.most_at_once == 3


@pytest.mark.parametrize(
    "fault",
    [
        error(500),
        error(503),
        error(529),
        error(408),
        error(409),
        error(429),
        Says(body='{"choices": [{"mess', reset_after=10),
        Says(body="x" * 300, reset_after=0),
        Says(body="<html>Bad gateway</html>"),
        Says(body=""),
        Says(body='{"choices": [{"message": {"content": "cut off'),
        Says(body=json.dumps({"error": {"message": "overloaded", "code": 529}})),
        Says(body=json.dumps({"choices": None})),
        Says(body=json.dumps({"choices": []})),
        Says(body=json.dumps({"choices": [choice(None), choice("")]})),
        Says(body=json.dumps({"choices": [None, {"message": None}, {"message": {"content": 7}}]})),
    ],
    ids=lambda says: f"{says.status} {says.body[:25]}".replace("/", ""),
)
def test_a_fault_is_tried_again_and_never_taken_for_an_answer(tmp_path, fault):
    prompts = [f"p{i}" for i in range(3)]
    out = Outcome(tmp_path, first_then_good(fault), prompts)
    assert out.texts == [[f"answer 0 to {p}", f"answer 1 to {p}"] for p in prompts]
    assert Counter(out.server.prompts) == dict.fromkeys(prompts, 2)
    assert (out.totals.num_answers, out.totals.num_failures, out.totals.num_open) == (3, 3, 0)


def test_attempts_are_bounded_and_a_failed_slot_is_told(tmp_path):
    out = Outcome(
        tmp_path,
        lambda call: error(500) if call.prompt == "bad" else good(call),
        ["a", "bad", "b"],
        concurrency=1,
    )
    assert Counter(out.server.prompts) == {"a": 1, "bad": QUICK.attempts, "b": 1}
    assert [c.finish_reason for c in out.answers[1]] == ["error", "error"]
    assert out.texts == [["answer 0 to a", "answer 1 to a"], ["", ""], [*out.texts[2]]]
    assert out.texts[2] == ["answer 0 to b", "answer 1 to b"]


def test_paid_answers_without_text_are_bounded_more_tightly(tmp_path):
    out = Outcome(tmp_path, lambda _: Says(body=json.dumps({"choices": []})), ["p"])
    assert len(out.server.calls) == QUICK.bad_answers < QUICK.attempts


def test_retry_after_holds_everyone_back(tmp_path):
    def behave(call: Call) -> Says:
        return error(429, retry_after="0.4") if call.number == 0 else good(call)

    out = Outcome(tmp_path, behave, [f"p{i}" for i in range(6)], concurrency=2)
    first, *rest = [call.at for call in out.server.calls]
    late = [at for at in rest if at - first >= 0.4]
    assert len(rest) == 6 and len(late) >= 5  # one more may have been on its way
    assert all(row[0].finish_reason == "stop" for row in out.answers)


def test_rate_limits_do_not_use_up_the_attempts(tmp_path):
    burst = [error(429, retry_after_ms="10")] * (QUICK.attempts + 3)
    out = Outcome(tmp_path, first_then_good(*burst), ["p"])
    assert out.texts == [["answer 0 to p", "answer 1 to p"]]


def test_a_wait_longer_than_our_patience_stops_the_run(tmp_path):
    out = Outcome(tmp_path, lambda _: error(429, retry_after="3600"), ["p"])
    assert isinstance(out.raised, TeacherUnavailable) and "wait 3600 seconds" in str(out.raised)
    assert len(out.server.calls) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 01:00:30 GMT",
          "date": "Thu, 01 Jan 2026 01:00:00 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2025 00:00:00 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "Fri, 31 Dec 99999 00:00:00 GMT"}, None),
        ({"retry-after": "1e12"}, None),
    ],
)  # fmt: skip
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after(headers, now=1767225600.0) == seconds  # 2026-01-01


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (error(401), CredentialsRefused, 12),
        (error(403), CredentialsRefused, 12),
        (error(402), QuotaExhausted, 11),
        (error(429, "insufficient_quota"), QuotaExhausted, 11),
        (Says(body=json.dumps({"error": {"code": "insufficient_quota"}})), QuotaExhausted, 11),
        (error(404, "model_not_found"), RequestRefused, 2),
        (error(400, "unsupported_parameter"), RequestRefused, 2),
        (error(422), RequestRefused, 2),
    ],
)
def test_what_would_fail_for_every_prompt_stops_at_once(tmp_path, fault, kind, code):
    def behave(call: Call) -> Says:
        return fault if call.number >= 4 else good(call)

    out = Outcome(tmp_path, behave, [f"p{i}" for i in range(12)], concurrency=1, url="tutor")
    assert type(out.raised) is kind and kind.exit_code == code
    assert len(out.server.calls) == 5
    rest = out.again(good, [f"p{i}" for i in range(12)], url="tutor")
    assert not set(rest.server.prompts) & set(out.server.prompts[:4])
    assert len(rest.server.calls) == 8


def test_what_is_in_flight_is_awaited_before_stopping(tmp_path):
    def behave(call: Call) -> Says:
        return error(401) if call.prompt == "p0" else Says(body=chat(call), delay_s=0.3)

    out = Outcome(tmp_path, behave, [f"p{i}" for i in range(9)], concurrency=4)
    assert isinstance(out.raised, CredentialsRefused)
    assert out.totals.num_answers == len(out.server.calls) - 1 == 3
    assert out.totals.num_open == 0


def test_a_prompt_that_is_too_long_fails_alone(tmp_path):
    def behave(call: Call) -> Says:
        return error(400, "context_length_exceeded") if call.prompt == "long" else good(call)

    out = Outcome(tmp_path, behave, ["a", "long", "b"], url="tutor")
    assert [row[0].finish_reason for row in out.answers] == ["stop", "error", "stop"]
    assert Counter(out.server.prompts)["long"] == 1
    again = out.again(good, ["a", "long", "b"], url="tutor")
    assert again.server.calls == [] and again.answers == out.answers  # for good


def test_a_prompt_that_fails_in_one_process_after_the_other_is_given_up(tmp_path):
    def behave(call: Call) -> Says:
        return error(500) if call.prompt == "bad" else good(call)

    out = Outcome(tmp_path, behave, ["a", "bad"], url="tutor")
    assert out.raised is None and out.answers[1][0].finish_reason == "error"
    for _ in range(2):  # nothing else is left to tell a bad prompt from a server in trouble
        assert isinstance(out.again(behave, ["a", "bad"], url="tutor").raised, TeacherUnavailable)
    last = out.again(behave, ["a", "bad"], url="tutor")
    assert last.server.calls == [] and last.answers == out.answers


def test_what_says_nothing_of_a_prompt_never_gives_it_up(tmp_path):
    busy = [error(429, retry_after_ms="1")] * (3 * QUICK.attempts)
    out = Outcome(tmp_path, first_then_good(*busy, error(401)), ["p"], url="tutor")
    assert isinstance(out.raised, CredentialsRefused)
    again = out.again(good, ["p"], url="tutor")
    assert again.texts == [["answer 0 to p", "answer 1 to p"]]


def test_an_unreachable_server_ends_the_run_and_costs_nothing(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        client = TeacherClient(
            config(price_usd=CENT_PER_THOUSAND, budget_usd=1.0),
            ledger,
            url="http://127.0.0.1:9/v1",
            free=True,
            patience=QUICK,
        )
        with pytest.raises(TeacherUnavailable, match=r"failing for too long|unanswered"):
            client.complete(asks(f"p{i}" for i in range(9)))
        assert ledger.spent_usd == 0.0


def test_a_server_that_ignores_n_is_asked_for_the_rest(tmp_path):
    def behave(call: Call) -> Says:
        return Says(body=chat(call, num_choices=1, choices=[choice(f"number {call.number}")]))

    out = Outcome(tmp_path, behave, ["p"], samples=4)
    assert out.texts == [["number 0", "number 1", "number 2", "number 3"]]
    assert [call.n for call in out.server.calls] == [4, 1, 1, 1]
    assert "n" not in out.server.calls[1].body


def test_missing_and_surplus_choices(tmp_path):
    def behave(call: Call) -> Says:
        if call.again:
            return good(call)
        return Says(body=chat(call, choices=[choice("A"), choice(None), choice("C"), choice("D")]))

    out = Outcome(tmp_path, behave, ["p"], samples=3)
    assert out.texts == [["A", "answer 0 to p", "C"]]


def test_cut_and_filtered_answers_are_told_and_not_asked_again(tmp_path):
    def behave(call: Call) -> Says:
        cut, filtered = choice("", finish_reason="length"), choice(None)
        return Says(body=chat(call, choices=[cut, filtered | {"finish_reason": "content_filter"}]))

    out = Outcome(tmp_path, behave, ["p"])
    assert [c.finish_reason for c in out.answers[0]] == ["length", "content_filter"]
    assert len(out.server.calls) == 1


def test_half_a_character_is_replaced_in_the_text_and_kept_in_the_ledger(tmp_path):
    def behave(call: Call) -> Says:
        whole, half = (
            choice("good \U0001f600"),
            choice("bad \ud83d"),
        )  # both escaped, as JSON has it
        return Says(body=chat(call, choices=[whole, half], model="m \ud83d", usage=None))

    out = Outcome(tmp_path, behave, ["p"])
    assert out.texts == [["good \U0001f600", "bad ?"]] and out.answers[0][1].num_tokens == 5
    (row,) = read_rows(out.path)
    assert row["raw"].count("\\ud83d") == 3 and row["served_model"] == "m ?"
    assert verify(out.path) == []


def test_drip_is_ended_by_the_total_time(tmp_path):
    patience = Patience(attempts=2, request_s=0.4, backoff_s=0.01)

    def behave(call: Call) -> Says:
        return Says(body=chat(call), drip_s=0.0 if call.again else 0.1)

    start = time.monotonic()
    out = Outcome(tmp_path, behave, ["p"], patience=patience)
    assert out.texts == [["answer 0 to p", "answer 1 to p"]]
    assert time.monotonic() - start < 3.0


def test_spending_is_booked_as_it_is(tmp_path):
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0, "concurrency": 1}
    out = Outcome(tmp_path, good, ["a", "b"], **priced)
    assert out.totals.spent_usd == pytest.approx(2 * (50 + 20) * 10 / 1e6)
    # without a usage the worst case stands: a token per byte, the limit for every sample
    out = Outcome(tmp_path, lambda c: Says(body=chat(c, usage=None)), ["c"], **priced)
    worst = (1 + 64 + 2 * 128) * 10 / 1e6
    assert out.totals.spent_usd == pytest.approx(2 * (50 + 20) * 10 / 1e6 + worst)
    assert [completion.num_tokens for completion in out.answers[0]] == [13, 13]


def test_tokens_that_only_the_total_counts_are_paid_and_an_overrun_is_said_once(tmp_path, caplog):
    def behave(call: Call) -> Says:
        usage = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 50 + 20 + 900}
        return Says(body=chat(call, usage=usage))

    out = Outcome(tmp_path, behave, ["a", "b"], price_usd=CENT_PER_THOUSAND, budget_usd=1.0)
    assert out.totals.spent_usd == pytest.approx(2 * (50 + 20 + 900) * 10 / 1e6)
    assert {(c.num_tokens, c.finish_reason) for row in out.answers for c in row} == {(10, "stop")}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "0.006490 US dollars more" in warning  # than (1 + 64 + 2 * 128) tokens cost


@pytest.mark.parametrize(
    ("fault", "billed"),
    [
        (error(500), False),
        (error(503), False),
        (error(429), False),
        *((error(status), True) for status in (502, 504, 520, 522, 524)),
        (Says(body="x" * 50, reset_after=9), True),
        (Says(body="<html>"), True),
    ],
)
def test_what_may_have_been_billed_counts_as_spent(tmp_path, fault, billed):
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0}
    out = Outcome(tmp_path, first_then_good(fault), ["c"], **priced)
    worst = (1 + 64 + 2 * 128) * 10 / 1e6
    assert out.totals.spent_usd == pytest.approx((50 + 20) * 10 / 1e6 + billed * worst)


def test_budget_stops_before_the_request_that_could_exceed_it(tmp_path):
    worst, real = (2 + 64 + 2 * 128) * 10 / 1e6, (50 + 20) * 10 / 1e6
    limit = 10 * real + worst  # room for eleven, whatever is reserved at the same time
    prompts = [f"{i:02}" for i in range(30)]
    priced = {"price_usd": CENT_PER_THOUSAND, "url": "tutor", "concurrency": 8}
    out = Outcome(tmp_path, good, prompts, budget_usd=limit, **priced)
    assert isinstance(out.raised, BudgetReached) and out.raised.exit_code == 10
    assert len(out.server.calls) == out.totals.num_requests == 11
    assert out.totals.spent_usd == pytest.approx(11 * real)
    more = out.again(good, prompts, budget_usd=1.0, **priced)
    assert len(more.server.calls) == 19 and len(more.texts) == 30


def test_another_model_answers_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Outcome(tmp_path, lambda c: Says(body=chat(c, model="m-2024")), ["a", "b", "c"])
    assert [
        record.getMessage().endswith("asked m, m-2024 answers.") for record in caplog.records
    ] == [True]


def test_the_key_is_sent_and_never_shown(tmp_path, caplog):
    echo = f"Incorrect API key provided: {KEY}"
    faults = [
        error(500, message=echo),
        Says(body=f"<html>{echo}"),
        error(429, message=echo, retry_after_ms="1"),
    ]

    def behave(call: Call) -> Says:
        if call.prompt == "last":
            return error(401, message=echo)
        return faults[call.again] if call.again < 3 else Says(body=chat(call, model=KEY))

    with caplog.at_level(logging.DEBUG):
        out = Outcome(tmp_path, behave, ["a", "b", "last"], concurrency=1)
    assert "[key]" in str(out.raised) and KEY not in str(out.raised)
    assert KEY not in caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(KEY.encode() in path.read_bytes() for path in written)
    database = sqlite3.connect(out.path)
    assert not any(KEY in line for line in database.iterdump())
    assert any("[key]" in line for line in database.iterdump())
    database.close()


def test_settings_that_can_not_work_are_refused_before_anything_is_sent(tmp_path, monkeypatch):
    with Ledger(tmp_path / "l") as ledger:
        with pytest.raises(ValueError, match=r"price of https://x/v1 is unknown"):
            TeacherClient(config(), ledger, url="https://me:pw@x/v1?k=1", free=False)
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(CredentialsRefused, match="TEACHER_KEY is not set"):
            TeacherClient(
                config(price_usd=(1.0, 1.0), budget_usd=1.0), ledger, url="https://x", free=False
            )


def test_an_answer_that_a_killed_process_left_unread_is_read_and_not_asked_again(tmp_path):
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0, "url": "tutor"}
    out = Outcome(tmp_path, good, ["p"], **priced)
    database = sqlite3.connect(out.path)  # as if it had died between storing and settling
    database.execute("UPDATE total SET spent = spent + 1000000 - (SELECT spent FROM intents)")
    database.execute("UPDATE intents SET reserved = 1000000, spent = NULL")
    database.commit()
    database.close()
    more = out.again(good, ["p"], **priced)
    assert more.server.calls == [] and more.texts == out.texts
    assert (more.totals.num_open, more.totals.spent_usd) == (0, out.totals.spent_usd)
