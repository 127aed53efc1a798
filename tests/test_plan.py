"""What is said before anything is spent, against what a teacher then really gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import Behaviour, Call, Says, chat, choice, fault_server, good
from paid_lesson import QUICK

from distill_jax.config import Config, parse_config
from distill_jax.config_file import override
from distill_jax.plan.teacher import plan_lines, plan_teacher
from distill_jax.progress import Progress
from distill_jax.questions import load_questions
from distill_jax.records import Lesson, Rationale
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import ask_teacher
from distill_jax.teaching import judge, make_prompt

TASK = {"name": "arithmetic", "num_train": 20, "dev_fraction": 0.2, "num_test": 5}
PAID = {"url": "https://x.example/v1", "price_usd": [1.0, 2.0], "budget_usd": 0.001}


def config(**teacher) -> Config:
    values = {"folder": "-", "task": TASK, "student": {"model": "m"}, "rounds": {"max": 1}}
    return parse_config({**values, "teacher": teacher})


def requests(folder: Path, config: Config, behave: Behaviour) -> tuple[int, int]:
    """Requests and prompt bytes of the first round."""
    questions = load_questions(config.task, seed=config.seed, data_dir=folder)
    with fault_server(behave) as (server, url), Ledger(folder / "l") as ledger:
        client = TeacherClient(config.teacher, ledger, url=url, free=True, patience=QUICK)
        Lesson(
            tuple(
                ask_teacher(
                    [question for question in questions if question.split == "train"],
                    {},
                    client.complete,
                    prompt=make_prompt(config),
                    round_index=1,
                    samples=config.teacher.samples,
                    extra_tries=config.teacher.extra_tries,
                )
            )
        )
    return len(server.calls), sum(len(prompt.encode()) for prompt in server.prompts)


def cut_and_alone(call: Call) -> Says:
    """One answer whatever was asked, and never a whole one."""
    return Says(body=chat(call, choices=[choice("So", finish_reason="length")]))


@pytest.mark.parametrize("extra_tries", [0, 2])
def test_the_bounds_are_what_the_best_and_the_worst_server_make_of_it(
    tmp_path: Path, extra_tries: int
):
    settings = config(samples=3, extra_tries=extra_tries)
    plan = plan_teacher(settings)
    assert plan.num_questions == 16
    sent, size = requests(tmp_path, settings, cut_and_alone)
    assert plan.requests.upper == sent == 16 * 3 * 2 * (1 + extra_tries)
    assert plan.prompt_tokens.upper == size + 64 * sent
    (tmp_path / "good").mkdir()

    def answers(call: Call) -> Says:  # for some number: all are the last one in a text
        texts = [choice(f"It is so.\nAnswer: {k}", index=k) for k in range(call.n)]
        return Says(body=chat(call, choices=texts))

    sent, size = requests(tmp_path / "good", config(samples=3), answers)
    assert plan.requests.low == sent == 16 and plan.prompt_tokens.low == size / 5


def judge_all(folder: Path, settings: Config, samples: int) -> list[int]:
    """Bytes of the prompts that are sent if every answer is kept and judged."""
    questions = load_questions(settings.task, seed=settings.seed, data_dir=folder)
    train = [question for question in questions if question.split == "train"]
    rows = [
        Rationale(question.id, 1, index, f"{'so ' * 20}{index}", question.answer, "kept")
        for question in train
        for index in range(samples)
    ]
    with fault_server(good) as (server, url):
        asked = settings.model_copy(
            update={"teacher": settings.teacher.model_copy(update={"url": url})}
        )
        list(judge(asked, folder, train, rows, round_index=1, progress=Progress(quiet=True)))
    return [len(prompt.encode()) for prompt in server.prompts]


def test_a_teacher_that_judges_is_asked_about_every_rationale(tmp_path: Path):
    limited = {**PAID, "samples": 3, "per_minute": [10, 0]}
    one, judging, both = (
        plan_teacher(override(config(**limited), [f"train.rows=[{rows}]"]))
        for rows in ("new", "new, judged", "new, own, judged")
    )
    sent = judge_all(tmp_path, config(samples=3), 3)
    assert judging.requests.upper - one.requests.upper == len(sent) == 16 * 3
    assert judging.requests.expected - one.requests.expected == 16 * 3 / 2
    assert judging.requests.low - one.requests.low == 16
    assert both.requests.upper - judging.requests.upper == 16 * 5  # greedy answers and 4 samples
    own = plan_teacher(override(config(**limited), ["train.rows=[own, judged]", "rounds.max=4"]))
    assert own.requests.expected == 16 * (1 + 3 / 2) + 16 * 4 * 5 / 2  # an exam in every round
    rest = sum(sent) - 48 * len(f"{'so ' * 20}0")
    assert judging.prompt_tokens.upper - one.prompt_tokens.upper == rest + 48 * (64 + 2 * 128)
    for name in ("low", "expected", "upper"):
        plans = (one, judging, both)
        dollars = [getattr(plan.usd, name) for plan in plans]
        times = [getattr(plan.minutes, name) for plan in plans]
        counts = [getattr(plan.requests, name) for plan in plans]
        assert dollars[0] < dollars[1] <= dollars[2] and times == [n / 10 for n in counts]


def test_dollars_follow_the_price_and_grow_with_the_rounds():
    one = plan_teacher(config(**PAID))
    assert one.usd.low == pytest.approx(
        (one.prompt_tokens.low * 1.0 + one.answer_tokens.low * 2.0) / 1e6
    )
    assert 0.0 < one.usd.low < one.usd.expected < one.usd.upper and not one.free
    more = config(**PAID).model_copy(
        update={"rounds": config().rounds.model_copy(update={"max": 4})}
    )
    four = plan_teacher(more)
    assert four.usd.low == one.usd.low and four.usd.expected > 1.5 * one.usd.expected
    assert four.requests.upper == 4 * one.requests.upper
    assert any("will probably pause" in line for line in plan_lines(more, four))


def test_a_local_teacher_is_free_and_says_so():
    local = config(url="http://127.0.0.1:8000/v1")
    plan = plan_teacher(local)
    assert plan.free and plan.usd.upper == 0.0
    assert plan_lines(local, plan)[-1] == "US dollars: nothing, the teacher is free"


def test_the_command(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"folder": str(tmp_path / "run"), "task": TASK,
                                "student": {"model": "m"}, "teacher": PAID}))  # fmt: skip
    words = [sys.executable, "-m", "distill_jax", "plan", str(path)]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    assert "nothing is known of the student: m is not a directory here" in done.stderr
    plan = json.loads(done.stdout)
    teacher = plan["teacher"]
    assert "student" not in plan and plan["hardware"] == plan["topologies"] == []
    assert teacher["num_questions"] == 16 and teacher["requests"]["low"] == 16
    assert teacher["usd"]["low"] < teacher["usd"]["expected"] < teacher["usd"]["upper"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "never spent: more than teacher.budget_usd, 0.00" in done.stdout
    assert not (tmp_path / "run").exists()
