"""Whole runs in buckets: the records of a run on a disk, whichever machines it was worked on."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from bucket_server import bucket_server
from fault_server import Call, FaultServer, Says, fault_server
from safetensors.numpy import load_file
from test_rounds import environment, lines, records
from test_several_processes import Runs, assert_same_records, export, teach, wait_for

from distill_jax.bucket import Bucket
from distill_jax.claim import OBJECT, SILENT_S
from distill_jax.run_folder import read_rows


class Machines(Runs):
    """Works on a run in a bucket; each machine has a home of its own and one of the processes."""

    def __init__(self, folder: Path, url: str, place: str, variables: dict[str, str]):
        super().__init__(folder, url)
        self.place, self.variables = place, variables
        self.bucket = Bucket(place)
        self.begun: list[subprocess.Popen] = []

    def variables_of(self, machine: str, devices: int) -> dict[str, str]:
        home = {"HOME": str(self.folder / machine)}
        return environment(self.compiled, devices) | self.variables | home

    def working_folder(self, machine: str) -> Path:
        scheme, _, place = self.place.partition("://")
        return self.folder / machine / ".cache/distill_jax/runs" / scheme / place

    def begin(self, *machines: str, settings: tuple[str, ...] = ()) -> list[subprocess.Popen]:
        command = [sys.executable, "-m", "distill_jax", "run", str(self.config), "--json"]
        command += [f"folder={self.place}", *settings]
        begun = []
        for machine, flags in zip(machines, self.flags(len(machines)), strict=True):
            with self.said(machine).open("w") as said:  # too much for a pipe that nobody reads
                process = subprocess.Popen(
                    [*command, *flags],
                    env=self.variables_of(machine, devices=len(machines)),
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    start_new_session=True,
                )
            begun.append(process)
        self.begun += begun
        return begun

    def said(self, machine: str) -> Path:
        """What the newest process of a machine told stderr."""
        return self.folder / f"{machine}.txt"

    def end(self, machine: str, settings: tuple[str, ...] = ()) -> Path:
        (process,) = self.begin(machine, settings=settings)
        out, _ = process.communicate(timeout=500)
        assert process.returncode == 0, self.said(machine).read_text()
        assert json.loads(out)["phase"] == "done"
        return self.working_folder(machine)

    def ask(self, machine: str, *words: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "distill_jax", *words, "--json"],
            env=self.variables_of(machine, devices=1),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def names(self) -> set[str]:
        return {*self.bucket.tags()}

    def saved(self, round_index: int) -> bool:
        """Whether the bucket has the state of some training step."""
        state = rf"round_{round_index:02d}/training/\d+/commit_success.txt"
        return any(re.fullmatch(state, name) for name in self.names())

    def paid(self) -> set[str]:
        """The prompts whose answers the bucket has."""
        copy = self.folder / "copy.sqlite"
        if "ledger.sqlite" not in self.names() or not self.bucket.get("ledger.sqlite", copy):
            return set()
        with closing(sqlite3.connect(copy)) as database:
            query = "SELECT request FROM requests WHERE key IN (SELECT key FROM answers)"
            requests = [json.loads(text) for (text,) in database.execute(query)]
        return {request["body"]["messages"][-1]["content"] for request in requests}

    def lose(self, processes: list[subprocess.Popen]) -> None:
        """Machines that are gone without a word, for longer than one waits for them."""
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        sign = json.loads(self.bucket.read(OBJECT) or b"")
        assert sign["held"]
        self.bucket.write(OBJECT, json.dumps(sign | {"time": sign["time"] - SILENT_S}).encode())


@pytest.fixture(scope="module")
def teacher() -> Iterator[tuple[FaultServer, str]]:
    with fault_server(teach) as running:
        yield running


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher) -> Path:
    """What a run does that nothing interrupts, in a folder on a disk."""
    return Runs(tmp_path_factory.mktemp("alone"), teacher[1]).finish("alone", count=1, devices=1)


@pytest.fixture(scope="module", params=["gs", "s3"])
def machines(request, tmp_path_factory, teacher) -> Iterator[Machines]:
    with bucket_server(request.param) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("machines")
        running = Machines(folder, teacher[1], f"{request.param}://lab/runs/a", variables)
        yield running
        for process in running.begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.mark.parametrize("machines", ["gs"], indirect=True)
def test_a_run_goes_on_from_machine_to_machine(
    machines: Machines, alone: Path, teacher: tuple[FaultServer, str]
):
    server, begun = teacher[0], len(teacher[0].calls)

    def stall(call: Call) -> Says:
        return teach(call) if call.number < begun + 4 else Says(delay_s=600)

    server.behave = stall
    first = machines.begin("first")
    wait_for(lambda: len(machines.paid()) >= 3, first)
    machines.lose(first)
    server.behave, paid, stalled = teach, machines.paid(), len(server.calls)
    second = machines.begin("second", "third")
    folder = machines.working_folder("second")
    wait_for(lambda: lines(folder, 1, "metrics") > 4 and machines.saved(1), second)
    machines.lose(second)
    done = machines.end("fourth")
    assert_same_records(done, alone)
    before = read_rows(folder / "round_01" / "metrics.partial.jsonl")
    assert read_rows(done / "round_01" / "metrics.jsonl")[:3] == before[:3]  # seconds, too

    twice = {prompt for prompt, n in Counter(server.prompts[begun:]).items() if n > 1}
    assert not twice & paid and twice <= {*server.prompts[begun:stalled]}
    assert {*Counter(server.prompts[stalled:]).values()} == {1}
    assert {*Counter(server.prompts[begun:])} == {*Counter(server.prompts[:begun])}
    assert "report.html" in machines.names()
    assert not [name for name in machines.names() if "partial" in name or "training" in name]


@pytest.mark.parametrize("machines", ["gs"], indirect=True)
def test_any_machine_reads_a_run(machines: Machines, alone: Path, tmp_path: Path):
    place = machines.place
    status = machines.ask("reader", "status", place)
    assert status["phase"] == "done"
    marks = machines.ask("reader", "exam", place, "--split", "dev", "--round", "2")
    assert marks["accuracy"] == status["rounds"][2]["dev_accuracy"]
    machines.ask("reader", "export", place, "--round", "2", "--to", str(tmp_path / "model"))
    got = load_file(tmp_path / "model" / "model.safetensors")
    for name, wanted in export(alone).items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    assert machines.ask("reader", "ledger", "verify", place)["sound"]
    machines.ask("reader", "analyse", "rounds", place)
    assert "analysis/rounds.md" in machines.names()


@pytest.mark.parametrize("machines", ["s3"], indirect=True)
def test_one_process_works_in_any_bucket(machines: Machines, alone: Path):
    settings = (f"student.model={alone / 'round_00' / 'student'}", "rounds.max=1")
    two = machines.begin("first", "second", settings=settings)
    for process, machine in zip(two, ["first", "second"], strict=True):
        process.communicate(timeout=100)
        assert process.returncode == 2
        assert "are written from all processes to gs://" in machines.said(machine).read_text()
    (first,) = machines.begin("first", settings=settings)
    folder = machines.working_folder("first")
    wait_for(lambda: lines(folder, 1, "metrics") > 0, [first])
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=100)
    assert first.returncode == 14, machines.said("first").read_text()
    part = "round_01/metrics.partial.jsonl"
    assert machines.bucket.read(part) == (folder / part).read_bytes()
    assert any("/training/" in name for name in machines.names())
    done = machines.end("second", settings=settings)
    got, wanted = records(done), records(alone)
    for name in wanted:
        if name.startswith(("round_00", "round_01", "questions")) and "metrics" not in name:
            assert got[name] == wanted[name], name
    before = read_rows(folder / part)
    assert read_rows(done / "round_01" / "metrics.jsonl")[: len(before)] == before  # seconds, too
    assert not [name for name in machines.names() if "partial" in name or "training" in name]
    marks = machines.ask("reader", "exam", machines.place, "--split", "dev", "--round", "1")
    right = [row["correct"] for row in got["round_01/dev.jsonl"]]
    assert marks["accuracy"] == sum(right) / len(right)
