"""A server that nobody here wrote: `transformers serve` with a tiny real model.

It gives one answer whatever `n` is, the same one each time, and cuts it at the limit: so much that
happens to real runs happens here at once.
"""

import importlib.util
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from asked import asks

from distill_jax.config import TeacherConfig
from distill_jax.records import Lesson, Question
from distill_jax.teacher.audit import read_model_uses, read_totals, verify
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import ask_teacher

NEEDED = ("torch", "fastapi", "accelerate", "uvicorn")
STARTING_S = 120.0


@pytest.fixture(scope="module")
def server(shared: Path, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """The base URL and the model's name."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra `reference`: {', '.join(missing)} not installed")
    model = tmp_path_factory.mktemp("served") / "stories"
    shutil.copytree(shared / "models" / "stories260k", model, copy_function=shutil.copyfile)
    path = model / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    log = (model / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, model / "log")
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        process.wait()
        log.close()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1.0):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def client(ledger: Ledger, server: tuple[str, str], **changes) -> TeacherClient:
    url, model = server
    config = TeacherConfig(url=url, model=model, samples=2, max_tokens=12, **changes)
    return TeacherClient(config, ledger, url=url, free=True)


def test_its_answers_are_kept_and_never_asked_again(tmp_path: Path, server, caplog):
    prompts = ["Once upon a time", "Lily had a dog", "One day", "Tom", "The sun", "A big"]
    with Ledger(tmp_path / "l") as ledger, caplog.at_level(logging.WARNING):
        first = client(ledger, server, concurrency=2).complete(asks(prompts))
    assert all(len(c.text.split()) > 2 for row in first for c in row)
    assert {c.finish_reason for row in first for c in row} == {"length"}
    said = [record.getMessage() for record in caplog.records]
    assert sum("is not sampling" in line for line in said) == 1
    assert read_totals(tmp_path / "l").num_requests == 12  # `n` is ignored: one by one
    with Ledger(tmp_path / "l") as ledger:
        assert client(ledger, server).complete(asks(prompts)) == first
    totals = read_totals(tmp_path / "l")
    assert (totals.num_requests, totals.num_failures, totals.num_open) == (12, 0, 0)
    (use,) = read_model_uses(tmp_path / "l")
    assert use.num_estimated == 0 and dict(use.finish_reasons) == {"length": 12}
    assert verify(tmp_path / "l") == []


def test_a_lesson_from_it_adds_up(tmp_path: Path, server):
    questions = [Question(f"q/{i}", f"{i} + 1?", str(i + 1), "train", "numeric") for i in range(2)]
    with Ledger(tmp_path / "l") as ledger:
        lesson = Lesson(
            tuple(
                ask_teacher(
                    questions,
                    {},
                    client(ledger, server).complete,
                    prompt=lambda question, mistake: question.text,
                    round_index=1,
                    samples=2,
                )
            )
        )
    assert lesson.num_asked == 4 == len(lesson.kept) + sum(lesson.rejected.values())
    totals = read_totals(tmp_path / "l")
    assert totals.num_answers == 8  # each was cut, and asked for again with twice the tokens
