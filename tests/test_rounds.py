"""Whole runs: every count adds up, and no interruption or device count changes a record."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_devices import fake_devices

from distill_jax.records import Attempt, Lesson, Question, Rationale
from distill_jax.run_folder import read_records, read_rows

SMALL = {
    "task": {
        "name": "arithmetic",
        "num_train": 30,
        "num_test": 6,
        "dev_fraction": 0.2,
        "arithmetic": [[1, 2], 9],
    },
    "student": {"model": "scratch", "compute_dtype": "float32"},
    "scratch": [32, 2, 120],
    "exam": {
        "samples": 2,
        "max_new_tokens": (40, 40),
        "slots": 16,
    },
    "teacher": {"samples": 3, "concurrency": 2},
    "train": {
        "epochs": 2,
        "batch_size": 8,
        "microbatch_size": 8,
        "learning_rates": [3e-4],
        "warmup_steps": 2,
        "checkpoint_every": [3, 10.0],
    },
    "reflection": {"weight": 0.05},
    "rounds": {"max": 2, "patience": 2},
}
STAGES = ("exam", "lesson", "metrics", "dev")


def environment(compiled: Path, devices: int) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": fake_devices(devices),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Runs:
    """Starts runs of the small config in processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump({"folder": "unused", **SMALL}))

    def start(self, name: str, *settings: str, devices: int = 1) -> subprocess.Popen:
        command = [sys.executable, "-m", "distill_jax", "run", str(self.config)]
        return subprocess.Popen(
            [*command, f"folder={self.folder / name}", *settings, "--json"],
            env=environment(self.folder / f"compiled_{devices}", devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, name: str, *settings: str, devices: int = 1) -> Path:
        process = self.start(name, *settings, devices=devices)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        assert json.loads(out)["phase"] == "done"
        return self.folder / name

    def kill_when(self, name: str, seen: Callable[[], bool], *settings: str) -> None:
        process = self.start(name, *settings)
        while not seen():
            assert process.poll() is None, f"ended too soon: {process.communicate()}"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Path:
    return runs.finish("undisturbed")


def stage(folder: Path, round_index: int, name: str) -> Path:
    return folder / f"round_{round_index:02d}" / f"{name}.jsonl"


def lines(folder: Path, round_index: int, name: str) -> int:
    """Rows of an unfinished stage."""
    path = stage(folder, round_index, f"{name}.partial")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun(folder: Path, round_index: int, name: str) -> bool:
    """Whether a stage has its first rows, or all of them: a short one may end between two looks."""
    return stage(folder, round_index, name).exists() or lines(folder, round_index, name) > 0


def num_answers(folder: Path) -> int:
    ledger = folder / "ledger.sqlite"
    if not ledger.exists():
        return 0
    with sqlite3.connect(ledger, timeout=10) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if "answers" not in tables:
            return 0
        return database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]


TIMED = {"seconds", "tokens_per_second"}


def records(folder: Path) -> dict[str, list[dict]]:
    """Every row of every stage, without the time that it took."""
    names = [stage(folder, r, name) for r in (1, 2) for name in STAGES]
    names += [stage(folder, 0, "dev"), folder / "test.jsonl", folder / "questions.jsonl"]
    return {
        str(path.relative_to(folder)): [
            {key: value for key, value in row.items() if key not in TIMED}
            for row in read_rows(path)
        ]
        for path in names
    }


def test_every_count_adds_up(undisturbed: Path):
    questions = read_records(undisturbed / "questions.jsonl", Question)
    train = [question for question in questions if question.split == "train"]
    dev = [question for question in questions if question.split == "dev"]
    assert (len(train), len(dev), len(questions)) == (24, 6, 36)
    for round_index in (1, 2):
        attempts = read_records(stage(undisturbed, round_index, "exam"), Attempt)
        assert [(a.question_id, a.sample_index) for a in attempts] == [
            (question.id, sample) for question in train for sample in range(3)
        ]
        assert all(a.round_index == round_index - 1 for a in attempts)
        wrong = {a.question_id for a in attempts if a.sample_index == 0 and not a.correct}
        asked = {question.id for question in train} if round_index == 1 else wrong
        lesson = Lesson(tuple(read_records(stage(undisturbed, round_index, "lesson"), Rationale)))
        assert {row.question_id for row in lesson.rows} == asked
        assert lesson.num_asked == 3 * len(asked)
        assert lesson.num_asked == len(lesson.kept) + sum(lesson.rejected.values())
        facts = json.loads(stage(undisturbed, round_index, "x").with_name("round.json").read_text())
        assert facts["rows"] + sum(facts["dropped_rows"].values()) == len(lesson.kept)
        metrics = read_rows(stage(undisturbed, round_index, "metrics"))
        assert [row["step"] for row in metrics] == list(range(facts["steps"]))
        assert {row["epoch"] for row in metrics} == {0, 1}
        assert set(facts["seconds"]) - {"test"} == {"exam", "teach", "train", "dev"}
        assert len(read_rows(stage(undisturbed, round_index, "dev"))) == len(dev)
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["rounds"] == 2 and result["stop_reason"] == "the limit of 2 rounds"
    test = read_records(undisturbed / "test.jsonl", Attempt)
    assert {a.round_index for a in test} == {0, result["chosen_round"]}
    assert (undisturbed / "report.html").exists()
    assert not list(undisturbed.rglob("*.partial.jsonl"))


def test_a_run_killed_in_every_stage_ends_with_the_same_records(runs: Runs, undisturbed: Path):
    folder = runs.folder / "killed"
    runs.kill_when("killed", lambda: 0 < lines(folder, 1, "exam") < 24 * 3)
    runs.kill_when("killed", lambda: 3 <= num_answers(folder) < 24)
    assert not stage(folder, 1, "lesson").exists()
    runs.kill_when("killed", lambda: lines(folder, 1, "metrics") >= 5)
    assert not stage(folder, 1, "metrics").exists()
    runs.kill_when("killed", lambda: begun(folder, 1, "dev"))
    assert runs.finish("killed") == folder
    assert records(folder) == records(undisturbed)
    assert num_answers(folder) == num_answers(undisturbed) > 24
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        query = "SELECT COUNT(*), COUNT(DISTINCT key || slots) FROM answers"
        total, distinct = database.execute(query).fetchone()
    assert total == distinct, "an answered request was asked again"


def test_a_finished_run_is_left_alone(runs: Runs, undisturbed: Path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.jsonl")}
    runs.finish("undisturbed")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.jsonl")} == before


def test_eight_devices_give_the_records_and_losses_of_one(runs: Runs, undisturbed: Path):
    student = f"student.model={undisturbed / 'round_00' / 'student'}"
    many = records(runs.finish("eight", student, devices=8))
    one = records(undisturbed)
    for name, rows in one.items():
        if "metrics" not in name:
            assert many[name] == rows, name
            continue
        # Adam divides by small gradients, so rounding grows from step to step: the reflection
        # loss, a mean over few rows, shows it first. The first gradient has no step before it.
        for key, tolerance in {"loss": 1e-5, "lm_loss": 1e-5, "reflection_loss": 1e-4}.items():
            got, wanted = ([row[key] for row in table] for table in (many[name], rows))
            np.testing.assert_allclose(got, wanted, rtol=tolerance, err_msg=f"{name} {key}")
        got, wanted = (table[0]["gradient_norm"] for table in (many[name], rows))
        np.testing.assert_allclose(got, wanted, rtol=1e-5 if "round_01" in name else 1e-3)


def test_other_settings_in_the_same_folder_are_refused_by_name(runs: Runs, undisturbed: Path):
    command = [sys.executable, "-m", "distill_jax", "run", str(runs.config)]
    changed = [f"folder={undisturbed}", "train.epochs=5", "teacher.budget_usd=3"]
    done = subprocess.run([*command, *changed], capture_output=True, text=True)
    assert done.returncode == 2
    assert "other settings (train.epochs: 2 -> 5); continue it with its own" in done.stderr
    assert done.stdout == ""


def test_another_folder_with_a_copy_of_the_ledger_buys_nothing_twice(runs: Runs, undisturbed: Path):
    folder = runs.folder / "slower"
    folder.mkdir()
    for path in undisturbed.glob("ledger.sqlite*"):
        shutil.copy(path, folder)
    student = f"student.model={undisturbed / 'round_00' / 'student'}"
    runs.finish("slower", student, "train.learning_rates=[1e-4]", "rounds.max=1")
    first = [read_rows(stage(path, 1, "lesson")) for path in (folder, undisturbed)]
    assert first[0] == first[1] and num_answers(folder) == num_answers(undisturbed)


def test_a_stage_that_is_gone_with_the_result_is_repeated(runs: Runs, undisturbed: Path):
    folder = shutil.copytree(undisturbed, runs.folder / "repeated")
    stage(folder, 1, "dev").unlink()
    assert not stage(runs.finish("repeated"), 1, "dev").exists()
    (folder / "result.json").unlink()
    assert records(runs.finish("repeated")) == records(undisturbed)
