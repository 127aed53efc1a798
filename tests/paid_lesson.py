"""A lesson of some requests against a fault server: in this process, or in one to be killed."""

import os
import subprocess
import sys
from pathlib import Path

from fault_server import Call, Says, chat, choice, error

from distill_jax.cli import app
from distill_jax.config import TeacherConfig
from distill_jax.records import Completion, Question
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.governor import Patience
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import Complete, ask_teacher

CONCURRENCY = 8
QUICK = Patience(
    attempts=4,
    request_s=5.0,
    total_s=10.0,
    backoff_s=0.01,
    cool_down_s=0.02,
    outage_s=1.5,
    poll_s=0.01,
)


def rows_from(complete: Complete, size: int) -> list[str]:
    """The lesson's rows, as text."""
    questions = [
        Question(f"q/{i}", f"{i} + 1?", str(i + 1), "train", "numeric") for i in range(size)
    ]
    lesson = ask_teacher(
        questions,
        {},
        complete,
        prompt=lambda question, mistake: question.text,
        round_index=1,
        samples=2,
    )
    return [repr(row) for row in lesson.rows]


def teach(path: Path, url: str, size: int) -> list[str]:
    """The lesson as a server gives it."""
    config = TeacherConfig(samples=2, concurrency=CONCURRENCY)
    with Ledger(path) as ledger:
        client = TeacherClient(config, ledger, url=url, free=True, patience=QUICK)
        return rows_from(client.complete, size)


def told_right(size: int) -> list[str]:
    """The lesson of a server that nothing disturbs."""
    return rows_from(
        lambda asks: [
            [Completion(t, "stop", 10) for t in sums(ask.prompt, len(ask.slots))] for ask in asks
        ],
        size,
    )


def sums(prompt: str, count: int) -> list[str]:
    """A right answer, then wrong ones."""
    number = int(prompt.split()[0])
    return [f"{number} + 1 = {number + 1 + k}.\nAnswer: {number + 1 + k}" for k in range(count)]


def fails_once(prompt: str) -> bool:
    return int(prompt.split()[0]) % 9 == 4


def sum_up(call: Call, delay_s: float = 0.02) -> Says:
    """Answers after a while; every ninth prompt is refused the first time."""
    if fails_once(call.prompt) and not call.again:
        return error(500)
    choices = [choice(text, index=k) for k, text in enumerate(sums(call.prompt, call.n))]
    return Says(body=chat(call, choices=choices), delay_s=delay_s)


def start(path: Path, url: str, size: int) -> subprocess.Popen[str]:
    """The same lesson as a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, "paid-lesson", str(path), url, str(size)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    )


@app.command()
def paid_lesson(path: Path, url: str, size: int) -> None:
    """What `start` runs; the command group turns its end into an exit code."""
    teach(path, url, size)


if __name__ == "__main__":
    app()
