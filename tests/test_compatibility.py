"""Servers that understand less than they should, or say something else than they mean."""

import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from asked import CENT_PER_THOUSAND, Outcome, asks, config
from fault_server import Behaviour, Call, Says, chat, choice, fault_server, good
from paid_lesson import QUICK

from distill_jax.records import Lesson, Question
from distill_jax.teacher.account import Account, Ask
from distill_jax.teacher.audit import verify
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.dialect import Dialect
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import ask_teacher
from distill_jax.teacher.reply import CredentialsRefused, QuotaExhausted, RequestRefused


def refuses(name: str) -> Behaviour:
    """A server that doesn't know a parameter."""
    problem = {"message": f"Unsupported parameter: '{name}'", "param": name}

    def behave(call: Call) -> Says:
        if name in call.body:
            return Says(400, json.dumps({"error": problem}))
        return good(call)

    return behave


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p", "n"])
def test_06_what_a_model_refuses_is_found_out_once_and_remembered(tmp_path: Path, name: str):
    prompts = [f"p{i}" for i in range(20)]
    with fault_server(refuses(name)) as (server, url):
        for number in (10, 20):
            with Ledger(tmp_path / "l") as ledger:
                client = TeacherClient(
                    config(concurrency=3), ledger, url=url, free=True, patience=QUICK
                )
                rows = client.complete(asks(prompts[:number]))
            assert {c.finish_reason for row in rows for c in row} == {"stop"}
    refused = [call for call in server.calls if name in call.body]
    assert 1 <= len(refused) <= 3  # those that were on their way together
    assert {call.prompt for call in refused} <= {"p0", "p1", "p2"}
    known = server.calls[-1].body
    assert ("max_completion_tokens" in known) == (name == "max_tokens")
    assert set(known) >= {"model", "messages"} and name not in known


@pytest.mark.parametrize(
    "problem",
    [
        {"message": "max_tokens must be positive", "param": "max_tokens"},
        {"message": "unsupported model"},
        {"message": "Unsupported parameter: 'n', 'max_tokens', 'temperature', 'top_p'"},
    ],
)
def test_06_a_refusal_that_can_not_be_helped_is_no_loop(tmp_path: Path, problem: dict):
    body = json.dumps({"error": problem})
    out = Outcome(tmp_path, lambda _: Says(400, body), [f"p{i}" for i in range(9)], concurrency=1)
    assert isinstance(out.raised, RequestRefused)
    assert len(out.server.calls) <= 5  # one more for each part that can be left out


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p"])
def test_06_answers_are_found_whatever_is_refused_later(tmp_path: Path, name: str):
    def behave(call: Call) -> Says:
        return good(call) if call.number < 3 else refuses(name)(call)

    prompts = [f"p{i}" for i in range(6)]
    out = Outcome(tmp_path, behave, prompts, concurrency=1, url="tutor")
    assert out.texts == [[f"answer 0 to {p}", f"answer 1 to {p}"] for p in prompts]
    assert Counter(out.server.prompts) == dict.fromkeys(prompts, 1) | {"p3": 2}
    again = out.again(good, prompts, url="tutor")
    assert again.server.calls == [] and again.texts == out.texts
    assert verify(out.path) == []


def test_06_answers_under_the_key_of_what_was_sent_are_found(tmp_path: Path):
    with Ledger(tmp_path / "l") as ledger:
        account = Account(config(), ledger, url="http://x/v1", free=True)
        account.speak(ledger, Dialect("max_completion_tokens"))
        request = account.request(Ask("p", (0,)))
        sent = {**request.identity, "body": request.body}  # an earlier version made its key of it
        intent = ledger.reserve(sent, (0,), usd=0.0, limit_usd=None)
        assert intent is not None
        ledger.store(intent, json.dumps({"choices": [choice("4")]}), attempts=1, latency_s=0.1)
        assert [c.text for c in account.answers(ledger, request).values()] == ["4"]
    assert verify(tmp_path / "l") == []


def embedded(code: str | int) -> Says:
    return Says(body=json.dumps({"error": {"message": "no", "code": code}}))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (429, "rate limit"),
        ("rate_limit_exceeded", "rate limit"),
        ("overloaded_error", "server error"),
        (503, "server error"),
        ("something_new", "bad answer"),
        (None, "bad answer"),
        ("context_length_exceeded", "refused prompt"),
    ],
)
def test_13_an_error_with_status_200_is_what_its_code_says(tmp_path: Path, code, kind: str):
    out = Outcome(tmp_path, lambda c: good(c) if c.again else embedded(code), ["p"])
    assert len(out.server.calls) == (1 if kind == "refused prompt" else 2)
    with sqlite3.connect(out.path) as database:
        (detail,) = database.execute("SELECT detail FROM failures").fetchone()
    database.close()
    assert "an error with status 200" in detail
    assert out.totals.num_answers == (kind != "refused prompt")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("insufficient_quota", QuotaExhausted),
        (402, QuotaExhausted),
        ("invalid_api_key", CredentialsRefused),
        (403, CredentialsRefused),
        ("model_not_found", RequestRefused),
    ],
)
def test_13_an_error_with_status_200_may_end_the_run(tmp_path: Path, code, kind: type):
    out = Outcome(tmp_path, lambda _: embedded(code), ["p", "q"], concurrency=1)
    assert type(out.raised) is kind and len(out.server.calls) == 1


def thinking(content: str | None, **changes) -> dict:
    message = {"role": "assistant", "content": content, "reasoning_content": "2 and 3 ..."}
    return choice(content) | {"message": message | changes.pop("message", {})} | changes


def test_14_reasoning_alone_is_no_answer_and_is_kept(tmp_path: Path):
    def behave(call: Call) -> Says:
        if call.again:
            return good(call)
        return Says(body=chat(call, choices=[thinking(None), thinking("")]))

    out = Outcome(tmp_path, behave, ["p"])
    assert out.texts == [["answer 0 to p", "answer 1 to p"]]
    with sqlite3.connect(out.path) as database:
        (detail,) = database.execute("SELECT detail FROM failures").fetchone()
    database.close()
    assert "2 and 3 ..." in detail


def test_14_a_refusal_is_not_asked_again(tmp_path: Path):
    def behave(call: Call) -> Says:
        no = thinking(None, message={"refusal": "I can't help with that."})
        return Says(body=chat(call, choices=[no, choice("Yes.")]))

    out = Outcome(tmp_path, behave, ["p"])
    assert [c.finish_reason for c in out.answers[0]] == ["content_filter", "stop"]
    assert len(out.server.calls) == 1


FOUR = Question("q/1", "3 + 1?", "4", "train", "numeric")


def taught(folder: Path, behave: Behaviour, **changes) -> tuple[Lesson, list[Call]]:
    """A lesson of one question; its answers may have 100 tokens."""
    knobs = config(max_tokens=100, **changes)
    with fault_server(behave) as (server, url), Ledger(folder / "l") as ledger:
        client = TeacherClient(knobs, ledger, url=url, free=True, patience=QUICK)
        lesson = Lesson(
            tuple(
                ask_teacher(
                    [FOUR],
                    {},
                    client.complete,
                    prompt=lambda question, mistake: question.text,
                    round_index=1,
                    samples=2,
                    extra_tries=knobs.extra_tries,
                )
            )
        )
    return lesson, server.calls


def usage(completion_tokens: int) -> dict:
    return {"prompt_tokens": 9, "completion_tokens": completion_tokens, "total_tokens": 0}


SAID = "3 + 1 = 4.\nAnswer: 4"
CUTS: dict[str, Callable[[Call], dict]] = {
    "15 it says so": lambda _: {"choices": [choice(SAID), choice("3 +", finish_reason="length")]},
    "15 by another name": lambda _: {
        "choices": [choice(SAID), choice("3", finish_reason="max_tokens")]
    },
    "16 no answer at the end": lambda _: {"choices": [choice(SAID), choice("Three and one make")]},
    "16 as many tokens as allowed": lambda call: {
        "choices": [choice(SAID), choice("So it is 4")],
        "usage": usage(200),
    },
    "14 only reasoning": lambda _: {
        "choices": [choice(SAID), thinking(None, finish_reason="length")]
    },
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_what_was_cut_is_asked_for_once_more_with_twice_the_tokens(tmp_path: Path, cut: Callable):
    def behave(call: Call) -> Says:
        if call.body["max_tokens"] == 100:
            return Says(body=chat(call, **cut(call)))
        whole = [choice(f"{k + 1} + {3 - k} = 4.\nAnswer: 4", index=k) for k in range(call.n)]
        return Says(body=chat(call, choices=whole))

    lesson, calls = taught(tmp_path, behave)
    assert [call.body["max_tokens"] for call in calls] == [100, 200]
    assert calls[1].n == (2 if usage(200) == cut(calls[0]).get("usage") else 1)
    assert [row.verdict for row in lesson.rows] == ["kept", "kept"]
    again, calls = taught(tmp_path, behave, url="tutor")  # another endpoint: asked anew
    assert again == lesson and len(calls) == 2


def test_15_what_stays_cut_is_told_and_never_trained_on(tmp_path: Path):
    def behave(call: Call) -> Says:
        return Says(body=chat(call, choices=[choice(SAID, finish_reason="length")] * call.n))

    lesson, calls = taught(tmp_path, behave)
    assert lesson.rejected == {"cut": 2} and not lesson.kept
    assert [call.body["max_tokens"] for call in calls] == [100, 200]


def test_more_tries_for_a_question_without_a_rationale(tmp_path: Path):
    def behave(call: Call) -> Says:
        texts = ["It is 5.\nAnswer: 5"] * call.n if call.number < 2 else [SAID, "4\nAnswer: 4"]
        return Says(body=chat(call, choices=[choice(text) for text in texts]))

    lesson, calls = taught(tmp_path, behave, extra_tries=5)
    assert len(calls) == 3  # no more than needed
    assert [row.verdict for row in lesson.rows] == ["wrong"] * 4 + ["kept", "leak"]
    assert [row.sample_index for row in lesson.rows] == list(range(6))
    assert lesson.num_asked == 6
    (tmp_path / "off").mkdir()
    lesson, calls = taught(tmp_path / "off", behave)
    assert lesson.rejected == {"wrong": 2} and len(calls) == 1  # off by default


def test_18_a_server_that_ignores_n_is_asked_one_by_one_from_then_on(tmp_path: Path):
    def behave(call: Call) -> Says:
        return Says(body=chat(call, choices=[choice(f"number {call.number}")]))

    out = Outcome(tmp_path, behave, [f"p{i}" for i in range(4)], samples=3, concurrency=1)
    assert [call.n for call in out.server.calls] == [3, *[1] * 11]
    assert sorted(Counter(out.server.prompts).values()) == [3] * 4


@pytest.mark.parametrize(("temperature", "warned"), [(1.0, 1), (0.0, 0)])
def test_19_a_teacher_that_does_not_sample_is_pointed_out_once(
    tmp_path: Path, caplog, temperature: float, warned: int
):
    def behave(call: Call) -> Says:
        return Says(body=chat(call, choices=[choice("the same")] * call.n))

    with caplog.at_level(logging.WARNING):
        Outcome(tmp_path, behave, [f"p{i}" for i in range(12)], temperature=temperature)
    assert sum("is not sampling" in record.getMessage() for record in caplog.records) == warned
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Outcome(tmp_path, good, [f"r{i}" for i in range(12)])
    assert not caplog.records


def test_20_without_usage_the_worst_case_stays_spent_and_is_marked(tmp_path: Path):
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0}
    out = Outcome(tmp_path, lambda c: Says(body=chat(c, usage=None)), ["c"], **priced)
    assert out.totals.spent_usd == pytest.approx((1 + 64 + 2 * 128) * 10 / 1e6)
    with sqlite3.connect(out.path) as database:
        assert database.execute("SELECT usage FROM answers").fetchone() == ("null",)
    database.close()
