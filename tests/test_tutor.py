"""The tutor over real HTTP: right when it should be, and wrong when it should be."""

import dataclasses
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from distill_jax.answers import read_answer, same_answer
from distill_jax.config import TeacherConfig, TutorConfig
from distill_jax.prompts import feedback_prompt, judge_prompt, teacher_demonstrations
from distill_jax.questions import rows
from distill_jax.questions.arithmetic import make_questions
from distill_jax.records import Kind, Lesson, Question
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.explanation import NUM_WORDINGS, explain, first_wrong_step, phrases
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import ask_teacher
from distill_jax.teacher.tutor import Tutor, serve

QUESTIONS = make_questions(num_train=60, num_test=0, steps=[2, 3, 4], max_value=30, seed=7)
NEVER, ALWAYS = TutorConfig(wrong_rates=(0.0, 0.0)), TutorConfig(wrong_rates=(1.0, 1.0))
INK = Question(
    "csqa/train/0",
    "What absorbs ink?",
    "e",
    "train",
    "choice",
    choices=("pocket", "hand", "inkwell", "drawer", "blotter"),
    solution="A blotter soaks up ink. Therefore, the answer is blotter (e).",
)
HAM = Question(
    "strategyqa/train/0",
    "Would Janet avoid ham?",
    "Yes",
    "train",
    "yes_no",
    solution="Ham is pork. Janet eats no pork. So, the answer is Yes.",
)


def ask(question: Question, mistake: str | None = None, *, task: str = "arithmetic") -> str:
    examples = teacher_demonstrations(task, feedback=mistake is not None, hint=True)
    return feedback_prompt(question, mistake=mistake, hint=True, demonstrations=examples)


def count_tokens(text: str) -> int:
    """Words and numbers, and signs, each on its own."""
    return sum(1 if part.isalnum() else len(part.strip()) for part in re.split(r"(\w+)", text))


@pytest.fixture(scope="module")
def url():
    with serve([*QUESTIONS, INK, HAM], tutor=NEVER, seed=3) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def chat(client, prompt: str, **changes):
    knobs = {"model": "tutor", "messages": [{"role": "user", "content": prompt}], "n": 4}
    return client.chat.completions.create(**(knobs | changes))


def test_speaks_the_protocol(client):
    reply = chat(client, ask(QUESTIONS[0]), temperature=1.0, top_p=0.9, max_tokens=128)
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) == 4
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.model == "tutor"
    assert reply.usage.prompt_tokens == count_tokens(ask(QUESTIONS[0]))
    assert reply.usage.completion_tokens == sum(map(count_tokens, texts))
    assert [model.id for model in client.models.list()] == ["tutor"]
    again = chat(client, ask(QUESTIONS[0]))
    assert [choice.message.content for choice in again.choices] == texts
    one = chat(client, ask(QUESTIONS[0]), n=1)
    assert [choice.message.content for choice in one.choices] == texts[:1]


def test_cut_at_max_tokens(client):
    whole = chat(client, ask(QUESTIONS[2]), n=1).choices[0].message.content
    count = count_tokens(whole)
    reply = chat(client, ask(QUESTIONS[2]), n=1, max_tokens=count)
    assert reply.choices[0].finish_reason == "stop" and reply.choices[0].message.content == whole
    reply = chat(client, ask(QUESTIONS[2]), n=1, max_tokens=count - 1)
    assert reply.choices[0].finish_reason == "length"
    assert whole.startswith(reply.choices[0].message.content)
    assert reply.usage.completion_tokens == count - 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is one model, 'tutor'"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
        ({"n": 0}, openai.BadRequestError, "n: Input should be greater than or equal to 1"),
        ({"n": NUM_WORDINGS + 1}, openai.BadRequestError, "n: Input should be less than"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input"),
        ({"stream": True}, openai.BadRequestError, "stream: Input should be False"),
        (
            {"messages": [{"role": "user", "content": "Question: Who?\nReasoning:"}]},
            openai.BadRequestError,
            "the last question of the prompt is not known",
        ),
    ],
)
def test_bad_requests_are_told_in_the_shape_of_openai(client, changes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        chat(client, ask(QUESTIONS[0]), **changes)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_many_at_once(url, tmp_path: Path):
    config = TeacherConfig(samples=4, concurrency=16)
    with Ledger(tmp_path / "l") as ledger:
        lesson = Lesson(
            tuple(
                ask_teacher(
                    [*QUESTIONS, INK, HAM],
                    {HAM.id: "Ham is a town. So, the answer is No."},
                    TeacherClient(config, ledger, url=url, free=True).complete,
                    prompt=ask,
                    round_index=1,
                    samples=4,
                )
            )
        )
    assert lesson.num_asked == 4 * 62
    assert lesson.rejected.get("wrong", 0) == lesson.rejected.get("unreadable", 0) == 0
    kept = {
        id: [row.text for row in lesson.kept if row.question_id == id] for id in (INK.id, HAM.id)
    }
    assert all(text.endswith("Therefore, the answer is blotter (e).") for text in kept[INK.id])
    assert all("It is wrong to say No." in text for text in kept[HAM.id])
    assert sum(len(set(texts)) for texts in kept.values()) >= 6
    arithmetic = [row for row in lesson.kept if row.question_id.startswith("arithmetic")]
    assert len(arithmetic) == 4 * 60


def test_the_same_question_in_a_later_round_is_told_in_other_words(url: str, tmp_path: Path):
    with Ledger(tmp_path / "l") as ledger:
        teacher = TeacherClient(TeacherConfig(), ledger, url=url, free=True)

        def lesson(round_index: int) -> list[tuple[str, str]]:
            asked = Lesson(tuple(ask_teacher(
                QUESTIONS[:3], {}, teacher.complete,
                prompt=ask, round_index=round_index, samples=2,
            )))  # fmt: skip
            return [(row.question_id, row.text) for row in asked.kept]

        first, second = lesson(1), lesson(2)
        assert len(first) == len(second) == 6
        assert not set(first) & set(second)
        assert lesson(1) == first


def test_rates_of_wrong_answers():
    questions = make_questions(num_train=150, num_test=0, steps=[2, 3], max_value=30, seed=1)
    rates = TutorConfig(wrong_rates=(0.3, 0.1))
    tutor = Tutor(questions, tutor=rates, seed=5)
    for mistake, rate in ((None, 0.3), ("5 + 5 = 11.", 0.1)):
        wrong = 0
        for question in questions:
            texts = tutor.answer(ask(question, mistake), samples=4)
            assert texts is not None
            for text in texts:
                answer = read_answer(text, "numeric")
                wrong += answer is None or not same_answer(answer, question.answer, "numeric")
        deviation = (600 * rate * (1 - rate)) ** 0.5
        assert abs(wrong - 600 * rate) < 4 * deviation
    assert tutor.answer(ask(questions[0]), samples=4) == tutor.answer(ask(questions[0]), samples=4)
    other = Tutor(questions, tutor=rates, seed=6)
    assert any(
        tutor.answer(ask(q), samples=4) != other.answer(ask(q), samples=4) for q in questions[:50]
    )


def test_the_last_question_of_the_prompt_is_answered():
    a, b = QUESTIONS[0], QUESTIONS[1]
    tutor = Tutor(QUESTIONS, tutor=NEVER, seed=0)
    demonstration = f"{ask(a)} {a.solution}\nAnswer: {a.answer}\n"
    prompt = feedback_prompt(b, mistake=None, hint=False, demonstrations=demonstration)
    assert tutor.answer(prompt, samples=1) == [f"{b.solution}\nAnswer: {b.answer}"]
    sneaky = dataclasses.replace(b, id="x", text=f"{b.text}\nQuestion: {a.text}")
    both = Tutor([*QUESTIONS, sneaky], tutor=NEVER, seed=0)
    assert both.answer(ask(sneaky), samples=1) == tutor.answer(ask(b), samples=1)


def test_a_tip_names_the_first_wrong_step_behind_the_steps():
    question = dataclasses.replace(
        QUESTIONS[0], answer="3", solution="Leo has 2 * 6 = 12 coins. Leo has 12 - 9 = 3 coins."
    )
    mistake = "Leo has 2 * 6 = 500 coins. Leo has 500 + 1 = 9 coins.\nAnswer: 9"
    for way in range(NUM_WORDINGS):
        text = explain(question, mistake=mistake, wrong=False, way=way, seed="")
        reasoning, answer = text.split("\nAnswer: ")
        steps, tip = reasoning.split(" The first wrong step was ")
        assert tip.startswith("2 * 6 = 500. ") and tip.endswith(" 3.")
        assert steps.endswith("Leo has 12 - 9 = 3 coins.")
        assert answer == "3"


@pytest.mark.parametrize(
    ("mistake", "solution", "step"),
    [
        ("3 + 5 = 8. 8 * 2 = 17.", "5 + 3 = 8. 8 * 2 = 16.", "8 * 2 = 17"),
        ("5 + 3 = 8. 8 + 2 = 10.", "5 + 3 = 8. 8 * 2 = 16.", "8 + 2 = 10"),
        ("He has 3x4=$12, then $12 / 5 = 2.4.", "3 * 4 = 12. 12 / 4 = 3.", "$12 / 5 = 2.4"),
        ("1,000 - 1 = 999 and 7 - 9 = 2.", "1000 - 1 = 999.", "7 - 9 = 2"),
        ("5 + 3 = 8.", "5 + 3 = 8. 8 * 2 = 16.", None),
        ("5 / 0 = 1. ((5 + 3 = 8.", "5 + 3 = 8.", None),
        ("", "5 + 3 = 8.", None),
    ],
)
def test_first_wrong_step(mistake, solution, step):
    assert first_wrong_step(mistake, solution) == step


def test_a_wrong_step_is_carried_through():
    question = dataclasses.replace(
        QUESTIONS[0], answer="20", solution="Leo has 5 + 3 = 8 eggs. Leo has 8 * 3 = 24 eggs. "
        "Leo has 24 - 4 = 20 eggs.",
    )  # fmt: skip
    slipped = set()
    for seed in range(40):
        text = explain(question, mistake=None, wrong=True, way=0, seed=str(seed))
        one, two, three = (int(part.split()[0]) for part in text.split(" = ")[1:])
        told = text.splitlines()[0]
        assert text.endswith(f"\nAnswer: {three}") and three != 20
        assert f"Leo has {one} * 3 = " in told and f"Leo has {two} - 4 = " in told
        off = (one != 8) + (two != one * 3) + (three != two - 4)
        assert off == 1
        slipped.add((one != 8, two != one * 3, three != two - 4).index(True))
    assert slipped == {0, 1, 2}


def test_a_slip_does_not_touch_an_equal_number_of_another_origin():
    solution = "He has 2 + 3 = 5 eggs. She has 4 + 1 = 5 eggs. Both have 5 * 2 = 10 eggs."
    question = dataclasses.replace(QUESTIONS[0], answer="10", solution=solution)
    for seed in range(40):
        text = explain(question, mistake=None, wrong=True, way=0, seed=str(seed))
        first, second, third = (int(part.split()[0]) for part in text.split(" = ")[1:])
        assert f"{second} * 2 = " in text
        assert (first != 5) + (second != 5) + (third != second * 2) == 1


def real_questions(shared: Path) -> list[Question]:
    """The first of each published set."""
    files: dict[str, tuple[Kind, Callable]] = {
        "gsm8k/train.jsonl": ("numeric", rows.parse_gsm8k),
        "multiarith/MultiArith.json": ("numeric", rows.parse_multiarith),
        "svamp/SVAMP.json": ("numeric", rows.parse_svamp),
        "csqa/train_rand_split.jsonl": ("choice", rows.parse_csqa),
        "strategyqa/task.json": ("yes_no", rows.parse_strategyqa),
    }
    questions = []
    for name, (kind, parse) in files.items():
        text = (shared / "data" / name).read_text()
        if name.endswith(".jsonl"):
            found = [json.loads(line) for line in text.splitlines()[:40]]
        else:
            whole = json.loads(text)
            found = (whole["examples"] if isinstance(whole, dict) else whole)[:40]
        for i, row in enumerate(found):
            item = parse(row)
            id, parts = f"{name}/{i}", (item.choices, item.solution)
            questions.append(Question(id, item.text, item.answer, "train", kind, *parts))
    return questions


def test_every_published_set_is_told_in_four_ways_right_or_wrong(shared: Path):
    questions = real_questions(shared)
    assert len(questions) == 200
    right, wrong = (Tutor(questions, tutor=tutor, seed=1) for tutor in (NEVER, ALWAYS))
    for question in questions:
        prompt = ask(question, task="gsm8k")
        texts, others = right.answer(prompt, samples=4), wrong.answer(prompt, samples=4)
        assert texts is not None and others is not None
        assert len(set(texts)) == 4, question.id
        for told, should in ((texts, True), (others, False)):
            for text in told:
                answer = read_answer(text, question.kind, paragraphs=True)
                assert answer is not None, text
                assert same_answer(answer, question.answer, question.kind) == should, text


def test_phrases_cover_all_words_that_are_not_the_solutions_own():
    known = {word for phrase in phrases() for word in phrase.split()}
    question = dataclasses.replace(QUESTIONS[0], solution="a = b.", answer="8")
    for mistake in (None, "5 + 3 = 9.", "Answer: 9"):
        for way in range(NUM_WORDINGS):
            text = explain(question, mistake=mistake, wrong=False, way=way, seed="")
            words = set(text.splitlines()[0].replace("say 9.", "say 8.").split())
            assert words - {"a", "A", "=", "b."} <= known


def test_the_port_is_given_back_and_taken_ports_are_told():
    before = threading.active_count()
    with serve(QUESTIONS, tutor=NEVER, seed=0) as url:
        port = int(url.split(":")[2].split("/")[0])
        message = f"port {port} of 127.0.0.1 can't be used"
        with pytest.raises(ValueError, match=message), serve([], tutor=NEVER, seed=0, port=port):
            pass
    assert threading.active_count() == before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_judge_finds_the_wrong_step_behind_a_right_answer():
    question = next(q for q in QUESTIONS if q.group == "2 steps")
    sure = Tutor(QUESTIONS, tutor=NEVER, seed=3)
    told = explain(question, mistake="1 + 1 = 3.", wrong=False, way=1, seed="")
    assert "first wrong step was 1 + 1 = 3" in told
    wrong = explain(question, mistake=None, wrong=True, way=1, seed="")
    for text, word in ((told, "Yes"), (wrong, "No"), (f"2 + 2 = 5. {told}", "No")):
        assert sure.answer(judge_prompt(question, text), samples=1) == [f"Answer: {word}"]
    erring = Tutor(QUESTIONS, tutor=TutorConfig(wrong_rates=(0.0, 0.3)), seed=3)
    said = [erring.answer(judge_prompt(q, q.solution), samples=1) for q in QUESTIONS]
    assert 0.1 < said.count(["Answer: No"]) / len(said) < 0.5
