"""A sweep that is interrupted: the rest waits, and the same command does nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from test_student_analyses import CHEAP, ONE_DEVICE, SMALL

from distill_jax.run_folder import read_rows
from distill_jax.teacher.audit import read_totals

# A shell has its background jobs ignore interrupts, and so do all processes that these start.
LISTENING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(home: Path) -> subprocess.Popen:
    words = ("sweep", home / "small.yaml", "seed=1,2", "rounds.max=1", "--to", home, "--json")
    return subprocess.Popen(
        [sys.executable, "-c", LISTENING, "-m", "distill_jax", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_DEVICE,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def stamps(home: Path) -> dict[Path, int]:
    """When each finished file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in home.glob("small/*/round_*/*.jsonl")}


def test_an_interrupt_keeps_the_rest_waiting_and_the_same_command_goes_on(tmp_path: Path):
    small = {"folder": "unused", **SMALL, **CHEAP}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    first, second = (tmp_path / "small" / f"seed={seed}" for seed in (1, 2))
    process = start(tmp_path)
    wait_for(first / "round_01" / "exam.jsonl", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 14 and "Traceback" not in err, err
    members = json.loads(out)["members"]
    assert [member["exit_code"] for member in members] == [14, None]
    assert not any(member["finished"] for member in members)
    before = stamps(tmp_path)
    assert before and not list(second.glob("round_*"))

    process = start(tmp_path)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    after = stamps(tmp_path)
    assert {path: after[path] for path in before} == before
    for folder in (first, second):
        lesson = read_rows(folder / "round_01" / "lesson.jsonl")
        totals = read_totals(folder / "ledger.sqlite")
        asked = len({row["question_id"] for row in lesson})
        assert totals.num_requests == totals.num_answers == asked
        steps = [row["step"] for row in read_rows(folder / "round_01" / "metrics.jsonl")]
        assert steps == list(range(len(steps))) and steps
    (row,) = json.loads(out)["comparisons"]["arithmetic"]["rows"]
    assert row["seeds"] == [1, 2]
