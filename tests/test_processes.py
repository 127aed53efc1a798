"""Processes among each other: what is told, and who is found missing, lost or stuck."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from distill_jax.config import ConfigError
from distill_jax.membership import Member, find_member
from distill_jax.processes import Limits, Watch, _Sign, gather, is_main, tell

LIMITS = Limits(start=30.0, lost=5.0, stuck=100.0)


def test_a_process_on_its_own_asks_nobody():
    assert is_main()
    assert tell("adding", lambda: [1, "a"]) == [1, "a"]
    assert gather("counting", {"a": 1}) == [{"a": 1}]


class Moments:
    """The signs of three processes, as process 0 sees them."""

    def __init__(self):
        self.watch = Watch(0, 3, LIMITS)
        self.signs = {index: _Sign() for index in range(3)}

    def look(self, now: float, *, silent: Sequence[int] = (), **changes: dict) -> str:
        """All beat but those in `silent`; `p1=dict(steps=2)` changes the sign of process 1."""
        for index, sign in self.signs.items():
            changed = changes.get(f"p{index}", {})
            beat = sign.beat + (index not in silent)
            self.signs[index] = replace(sign, beat=beat, **changed)
        return self.watch.look(dict(self.signs), float(now))


def test_who_gives_no_sign_of_life_is_lost():
    team = Moments()
    assert team.look(0, p2={"doing": "exam, round 1"}) == ""
    assert team.look(4, silent=[2]) == ""
    assert team.look(5, silent=[2]) == ""
    problem = team.look(5.1, silent=[2])
    assert problem == "process 2 gave no sign of life for 5 s, last seen at: exam, round 1"


def test_a_sign_of_life_in_between_is_enough():
    team = Moments()
    for now in range(0, 90, 3):
        assert team.look(now, silent=[1] if now % 2 else []) == ""


def test_who_never_came_is_missing():
    watch = Watch(0, 4, LIMITS)
    assert watch.look({0: _Sign(1)}, 0.0) == ""
    assert watch.look({0: _Sign(2)}, 4.0) == ""
    assert watch.look({0: _Sign(3), 2: _Sign(1)}, 8.0) == ""
    signs = {0: _Sign(30), 2: _Sign(20)}
    assert watch.look(signs, 31.0) == "processes 1 and 3 did not come within 30 s"


def test_who_is_behind_the_others_is_stuck():
    team = Moments()
    assert team.look(0) == ""
    ahead, behind = {"phase": 4, "steps": 9}, {"phase": 4, "steps": 8, "doing": "training"}
    assert team.look(1, p0=ahead, p1=behind, p2=ahead) == ""
    for now in range(2, 101):
        assert team.look(now) == ""
    problem = team.look(101.1)
    assert problem == "process 1 made no progress for 100 s, stuck at: training"


def test_those_who_wait_are_not_stuck_while_the_one_they_wait_for_goes_on():
    team = Moments()
    waits = {"phase": 4, "waits": True}
    assert team.look(0, p0={"phase": 4, "doing": "teaching"}, p1=waits, p2=waits) == ""
    for now in range(1, 400):
        assert team.look(now, p0={"steps": now // 90}) == ""
    for now in range(400, 460):
        assert team.look(now) == ""
    assert team.look(461) == "process 0 made no progress for 100 s, stuck at: teaching"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("host:1", 2, None), "--process is missing"),
        ((None, None, 1), "--coordinator and --processes is missing"),
        (("host", 2, 1), "is the host:port of process 0, such as 10.0.0.1:8476; got 'host'"),
        (("host:1", 2, 2), "--process counts from 0 to --processes - 1; got 2 of 2"),
    ],
)
def test_half_a_description_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        find_member(*given, environ={})


def test_clusters_with_one_task_are_no_team():
    step = {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}
    assert find_member(None, None, None, environ=step) is None
    assert find_member(None, None, None, environ=step | {"SLURM_NTASKS": "2"}) == Member()
    assert find_member(None, None, None, environ={"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find_member(None, None, None, in_cluster=True, environ={}) == Member()


TEAM = """
import sys, time
from distill_jax.cluster import join
from distill_jax.membership import Member
from distill_jax.processes import Limits, gather, is_main, tell, tell_each, tick
index, port, act = int(sys.argv[1]), sys.argv[2], sys.argv[3]
limits = Limits(start=20, lost=2, stuck=4 if act == "hang" else 60)
with join(Member(f"localhost:{port}", 3, index), limits):
    big = "x" * 10**6 if is_main() else None
    assert tell("telling", lambda: [big, {"a": 1}]) == ["x" * 10**6, {"a": 1}]
    assert gather("gathering", index * 10) == [0, 10, 20]
    if act == "fail" and index == 1:
        raise ValueError("disks: all of them are full.")
    if act == "bug" and index == 2:
        raise KeyError("a bug")
    if act == "hang" and index == 1:
        tick("counting sheep")
        time.sleep(60)
    if act != "end":
        gather("waiting", None)
    assert tell("once more", lambda: 7) == 7
    assert list(tell_each("counting", lambda: range(2500 if is_main() else 0))) == [*range(2500)]
print("done", index)
"""


def start_three(act: str) -> list[tuple[int, str, str]]:
    """Exit codes, stdout and stderr of three processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    script = textwrap.dedent(TEAM)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(index), port, act],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    begun = time.monotonic()
    ends = [process.communicate(timeout=90) for process in processes]
    assert time.monotonic() - begun < 60
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def test_three_processes_tell_and_gather_and_part_in_peace():
    assert [(code, out) for code, out, _ in start_three("end")] == [
        (0, f"done {index}\n") for index in range(3)
    ]


def test_an_error_of_one_ends_all_with_its_code_and_sentence():
    ends = start_three("fail")
    assert [code for code, *_ in ends] == [2, 2, 2]
    said = "disks: all of them are full."
    assert ends[1][2].splitlines()[-1] == f"distill-jax: {said}"
    for _, _, err in (ends[0], ends[2]):
        assert err.splitlines()[-1] == f"distill-jax: process 1 ended: {said}"


def test_a_bug_of_one_keeps_its_traceback():
    ends = start_three("bug")
    assert [code for code, *_ in ends] == [1, 1, 1]
    assert "Traceback" in ends[2][2] and "KeyError" in ends[2][2]
    assert "Traceback" not in ends[0][2]
    assert ends[0][2].splitlines()[-1] == "distill-jax: process 2 ended: KeyError: 'a bug'"


def test_who_hangs_is_named_though_it_lives():
    for code, _, err in start_three("hang"):
        assert code == 14
        assert "process 1 made no progress for 4 s, stuck at: counting sheep" in err


SHELTERED = """
import os, signal, sys, time
from distill_jax.shelter import take_shelter
take_shelter(1)
print(os.getpid(), flush=True)
act = sys.argv[1]
if act == "leave":
    sys.exit(11)
if act == "abort":
    os.abort()
if act == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(14))
    print("ready", flush=True)
    time.sleep(60)
"""


def shelter(act: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SHELTERED, act],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_shelter_ends_as_what_it_shelters():
    left = shelter("leave")
    assert left.communicate(timeout=30)[1] == "" and left.returncode == 11
    aborted = shelter("abort")
    _, err = aborted.communicate(timeout=30)
    assert aborted.returncode == 14 and "process 0, which coordinates, is gone" in err
    asked = shelter("wait")
    assert asked.stdout is not None
    child = int(asked.stdout.readline())
    assert child != asked.pid and asked.stdout.readline() == "ready\n"
    asked.send_signal(signal.SIGTERM)
    asked.communicate(timeout=30)
    assert asked.returncode == 14


def test_what_is_sheltered_ends_with_its_shelter():
    process = shelter("wait")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=30)
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")
