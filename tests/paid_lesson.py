"""A lesson of some requests against a fault server: in this process, or in one to be killed."""

import contextlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from fault_server import Call, FaultServer, Says, chat, choice, error, fault_server

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
    rows = ask_teacher(
        questions,
        {},
        complete,
        prompt=lambda question, mistake: question.text,
        round_index=1,
        samples=2,
    )
    return [*map(repr, rows)]


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


def wait_for_calls(server: FaultServer, process: subprocess.Popen[str], number: int) -> bool:
    """Waits until the server has seen so many calls; False if the process ended before."""
    while len(server.calls) < number:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def answered_prompts(path: Path) -> set[str]:
    """The prompts whose answer a ledger holds."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        # a body that is none may be stored, if it was not read yet when the process died
        query = "SELECT request FROM answers JOIN requests USING (key) WHERE json_valid(raw)"
        rows = database.execute(query).fetchall()
    return {json.loads(row)["body"]["messages"][0]["content"] for (row,) in rows}


class Troubled:
    """A server with latency and faults that notes which prompts it has answered in full."""

    def __init__(self, seed: int):
        self._random = Random(seed)
        self.answered: Counter[str] = Counter()

    def __call__(self, call: Call) -> Says:
        delay_s = self._random.uniform(0.0, 0.06)
        fault = self._random.random() if call.again < 2 else 1.0
        if fault < 0.03:
            return error(500, message="busy")
        if fault < 0.06:
            return error(429, retry_after_ms="20")
        if fault < 0.08:
            return Says(body="<html>Bad gateway</html>")
        if fault < 0.10:
            return Says(body='{"choices": [{"mess', reset_after=9, delay_s=delay_s)
        self.answered[call.prompt] += 1
        choices = [choice(text, index=k) for k, text in enumerate(sums(call.prompt, call.n))]
        return Says(body=chat(call, choices=choices), delay_s=delay_s)


def survive(path: Path, *, size: int, kills: int, seed: int) -> dict[str, int | bool]:
    """A lesson that is killed again and again and then finished: what the server saw of it.

    Returns:
      `kills`; `requests` and `answers` as the server counted them; `same_rows`: whether the lesson
      is that of an undisturbed server; `asked_again`: answers that were in the ledger at a kill
      and asked for later; `paid_twice`: prompts answered more than once, and `most_paid_twice` for
      one kill.
    """
    random, troubled, marks = Random(seed), Troubled(seed), []
    most = max(2, 3 * size // (2 * kills))
    with fault_server(troubled) as (server, url):
        for _ in range(kills):
            process = start(path, url, size)
            goes_on = wait_for_calls(server, process, len(server.calls) + random.randint(1, most))
            time.sleep(random.uniform(0.0, 0.05))
            process.kill()
            process.communicate()
            time.sleep(0.1)  # what was on its way to the server has arrived
            held = answered_prompts(path) if path.exists() and path.stat().st_size else set()
            marks.append((len(server.calls), held, troubled.answered.copy()))
            if not goes_on:
                break
        process = start(path, url, size)
        process.communicate()
        rows = teach(path, url, size)
    lost = [
        (answered - before).total() - len(held - before_held)
        for (_, before_held, before), (_, held, answered) in itertools.pairwise(
            [(0, set(), Counter()), *marks]
        )
    ]
    return {
        "kills": len(marks),
        "requests": len(server.calls),
        "answers": troubled.answered.total(),
        "same_rows": rows == told_right(size),
        "asked_again": sum(len(set(server.prompts[at:]) & held) for at, held, _ in marks),
        "paid_twice": sum(count - 1 for count in troubled.answered.values()),
        "most_paid_twice": max(lost),
    }


@app.command()
def paid_lesson(path: Path, url: str, size: int) -> None:
    """What `start` runs; the command group turns its end into an exit code."""
    teach(path, url, size)


@app.command()
def survive_kills(size: int = 1000, kills: int = 200, seed: int = 0) -> None:
    """Prints what `survive` saw: python tests/paid_lesson.py survive-kills (ten minutes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        print(json.dumps(survive(path, size=size, kills=kills, seed=seed)))


if __name__ == "__main__":
    app()
