"""Whole runs on several processes: the records of one process, whoever is lost on the way."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from fault_server import Call, FaultServer, Says, chat, choice, error, fault_server
from safetensors.numpy import load_file
from test_rounds import SMALL, begun, environment, lines, records

TASK = {"num_train": 15, "num_test": 4, "arithmetic": [[1], 9]}
LOST_S = 4.0
SAID_S = 2.0  # several signs of life
EPOCHS = 6  # enough for a signal to come in time
LATEST_S = 40.0  # much more than it takes, since the machine may be busy; a hang takes for ever


def teach(call: Call) -> Says:
    """Answers as the hint says, at a pace that lets a test step in."""
    hint = re.findall(r"final answer should be (\d+)", call.prompt)[-1]
    texts = [f"The numbers of way {k} make {hint}.\nAnswer: {hint}" for k in range(call.n)]
    choices = [choice(text, index=k) for k, text in enumerate(texts)]
    return Says(body=chat(call, choices=choices), delay_s=0.05)


def teach_slowly(call: Call) -> Says:
    return dataclasses.replace(teach(call), delay_s=2 * SAID_S)


class Runs:
    """Starts runs of a small config, each on some processes with some devices."""

    def __init__(self, folder: Path, url: str):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.compiled = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "several_processes"
        config = SMALL | {"folder": "-", "task": SMALL["task"] | TASK}
        config |= {"scratch": [32, 1, 40], "train": SMALL["train"] | {"epochs": EPOCHS}}
        config["teacher"] = {"url": url, "samples": 2, "concurrency": 2}
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(json.loads(json.dumps(config))))

    def flags(self, count: int) -> list[list[str]]:
        """What tells each of some processes who it is."""
        if count == 1:
            return [[]]
        with socket.create_server(("localhost", 0)) as free:
            team = f"--coordinator localhost:{free.getsockname()[1]} --processes {count}"
        return [f"{team} --lost-after {LOST_S} --process {index}".split() for index in range(count)]

    def start(self, name: str, *settings: str, count: int, devices: int) -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "distill_jax", "run", str(self.config)]
        command += [f"folder={self.folder / name}", *settings, "--json"]
        processes = [
            subprocess.Popen(
                [*command, *own],
                env=environment(self.compiled, devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for own in self.flags(count)
        ]
        self.started += processes
        return processes

    def finish(self, name: str, *settings: str, count: int, devices: int) -> Path:
        first, *others = self.start(name, *settings, count=count, devices=devices)
        ends = [process.communicate(timeout=500) for process in (first, *others)]
        assert first.returncode == 0, ends
        assert json.loads(ends[0][0])["phase"] == "done"
        for process, (out, err) in zip(others, ends[1:], strict=True):
            assert (process.returncode, out) == (0, ""), err
        return self.folder / name

    def end(self) -> None:
        """Ends what a failed test has left."""
        for process in self.started:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FaultServer, str]]:
    with fault_server(teach) as running:
        yield running


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"), server[1])
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    """What one process with one device does."""
    return runs.finish("alone", count=1, devices=1)


@pytest.fixture(scope="module")
def student(alone: Path) -> str:
    return f"student.model={alone / 'round_00' / 'student'}"


def wait_for(seen: Callable[[], bool], processes: Sequence[subprocess.Popen]) -> None:
    while not seen():
        for process in processes:
            assert process.poll() is None, f"ended too soon: {process.communicate()}"
        time.sleep(0.005)


def since(call: Call) -> float:
    return time.monotonic() - call.at


def assert_same_records(folder: Path, wanted: Path) -> None:
    got = records(folder)
    for name, rows in records(wanted).items():
        if "metrics" not in name:
            assert got[name] == rows, name
            continue
        for key, tolerance in {"loss": 1e-5, "lm_loss": 1e-5, "reflection_loss": 1e-4}.items():
            ours, theirs = ([row[key] for row in table] for table in (got[name], rows))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=f"{name} {key}")


def export(folder: Path) -> dict[str, np.ndarray]:
    to = folder.with_name(f"{folder.name}_exported")
    command = [sys.executable, "-m", "distill_jax", "export", str(folder), "--round", "2"]
    subprocess.run([*command, "--to", str(to)], check=True, capture_output=True)
    return load_file(to / "model.safetensors")


def test_two_processes_give_records_losses_and_weights_of_one(
    runs: Runs, server: tuple[FaultServer, str], alone: Path, student: str
):
    before = len(server[0].calls)
    two = runs.finish("two", student, count=2, devices=2)
    asked = Counter(server[0].prompts[before:])
    assert asked == Counter(server[0].prompts[:before]) and set(asked.values()) == {1}
    assert_same_records(two, alone)
    weights = export(two)
    for name, wanted in export(alone).items():
        np.testing.assert_allclose(weights[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_whoever_is_lost_is_named_and_the_run_goes_on(
    runs: Runs, server: tuple[FaultServer, str], alone: Path, student: str
):
    teacher, folder = server[0], runs.folder / "lossy"

    def lose(index: int, seen: Callable[[], bool], number: int = signal.SIGKILL) -> str:
        """Sends one process a signal at a moment; returns what the other said and how it ended."""
        processes = runs.start("lossy", student, count=2, devices=2)
        wait_for(seen, processes)
        if number == signal.SIGSTOP:  # of the process and its shelter
            os.killpg(processes[index].pid, number)
        else:
            processes[index].send_signal(number)
        sent = time.monotonic()
        other = processes[1 - index]
        _, err = other.communicate(timeout=LATEST_S)
        assert time.monotonic() - sent < LATEST_S
        assert other.returncode == 14, err
        if number == signal.SIGSTOP:
            os.killpg(processes[index].pid, signal.SIGKILL)
        processes[index].communicate(timeout=LATEST_S)
        return err

    def teaching() -> bool:
        """Whether this has lasted long enough for both processes to have said so."""
        return len(teacher.calls) > before + 2 and since(teacher.calls[before + 2]) > SAID_S

    before = len(teacher.calls)
    err = lose(1, lambda: begun(folder, 1, "exam"))
    assert "process 1 gave no sign of life for 4 s, last seen at: exam, round 1" in err
    teacher.behave = teach_slowly
    err = lose(1, teaching, signal.SIGSTOP)
    teacher.behave = teach
    assert "process 1 gave no sign of life for 4 s, last seen at: teaching, round 1" in err
    assert "the same command goes on from here" in err
    err = lose(1, lambda: lines(folder, 1, "metrics") > 1, signal.SIGTERM)
    assert "training, round 1: saved after step" in err and "Traceback" not in err
    saved = {path.name for path in (folder / "round_01" / "training").iterdir()}
    assert str(int(re.findall(r"saved after step (\d+)", err)[-1])) in saved
    err = lose(1, lambda: begun(folder, 1, "dev"))
    assert re.search(r"process 1 gave no sign of life for 4 s, last seen at: .*, round [12]", err)
    err = lose(0, lambda: lines(folder, 2, "metrics") > 3)
    assert "process 0" in err and "the same command goes on from here" in err.lower()
    assert runs.finish("lossy", student, count=1, devices=1) == folder
    assert_same_records(folder, alone)
    assert max(Counter(teacher.prompts[before:]).values()) <= 2  # 2 were on their way when it ended


def test_an_error_of_the_first_process_ends_all_alike(runs: Runs, student: str):
    with fault_server(lambda call: error(401, message="no such key")) as (_, url):
        settings = [student, f"teacher.url={url}", "teacher.extra_tries=0"]
        processes = runs.start("refused", *settings, count=2, devices=2)
        ends = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [12, 12], ends
    said = [err.splitlines()[-1].removeprefix("distill-jax: ") for _, err in ends]
    assert said[1] == f"process 0 ended: {said[0]}"


def test_who_does_not_come_is_named(runs: Runs):
    begun = time.monotonic()
    flags = ["--coordinator", "localhost:{}", "--processes", "3", "--lost-after", "1"]
    with socket.create_server(("localhost", 0)) as free:
        flags[1] = flags[1].format(free.getsockname()[1])
    command = [sys.executable, "-m", "distill_jax", "run", str(runs.config), *flags, "--process"]
    both = [
        subprocess.Popen([*command, index], stderr=subprocess.PIPE, text=True) for index in "02"
    ]
    for process in both:
        _, err = process.communicate(timeout=LATEST_S)
        assert process.returncode == 14
        assert "distill-jax: process 1 did not come within 5 s" in err
    assert time.monotonic() - begun < LATEST_S
