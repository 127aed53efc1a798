"""What a crash at any byte leaves behind, and who may work on a run."""

import json
import multiprocessing
from pathlib import Path

import pytest

from distill_jax.config import ConfigError, parse_config
from distill_jax.config_file import override
from distill_jax.records import Question
from distill_jax.run_folder import (
    Partial,
    lock,
    open_run,
    partial_path,
    read_records,
    read_round,
    read_rows,
    sort_rows,
    timed,
    update_round,
    write_records,
    write_rows,
    write_text,
)

ROWS = [{"id": "a", "text": 'quotes " and\nlines'}, {"id": "b", "text": "\ud800 ü 字"}, {"id": "c"}]


def test_a_file_torn_at_any_byte_keeps_its_whole_lines(tmp_path: Path):
    path = tmp_path / "exam.jsonl"
    part = Partial(path)
    part.append(ROWS)
    part.close()
    whole = partial_path(path).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        partial_path(path).write_bytes(whole[:size])
        again = Partial(path)
        kept = sum(end <= size for end in ends)
        assert read_rows(partial_path(path)) == ROWS[:kept] and len(again) == kept
        again.append(ROWS[kept:])
        again.close()
        assert partial_path(path).read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\x00\x00\x00", b'{"id": "\xe5\xad', b"not json\n"])
def test_a_tail_that_is_no_row_is_cut_off(tmp_path: Path, tail: bytes):
    path = tmp_path / "exam.jsonl"
    partial_path(path).write_bytes(json.dumps(ROWS[2]).encode() + b"\n" + tail)
    part = Partial(path)
    assert read_rows(partial_path(path)) == [ROWS[2]]
    part.append([ROWS[0]])
    part.finish(path)
    assert read_rows(path) == [ROWS[2], ROWS[0]] and not partial_path(path).exists()


def test_keeping_fewer_rows_forgets_the_rest(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    part = Partial(path)
    part.append(ROWS)
    part.close()
    part = Partial(path)
    part.keep(1)
    part.append([ROWS[2]])
    part.finish(path)
    assert read_rows(path) == [ROWS[0], ROWS[2]]


def test_rows_are_sorted_as_they_stand(tmp_path: Path):
    path = tmp_path / "exam.jsonl"
    rows = [{"place": i * 7 % 10, "sample": i % 3, "text": f"ü\ud800 {i}"} for i in range(30)]
    part = Partial(path)
    part.append(rows)
    part.close()
    assert sort_rows(path, lambda row: (row["place"], row["sample"])) == 30
    assert read_rows(path) == sorted(rows, key=lambda row: (row["place"], row["sample"]))
    assert [each.name for each in tmp_path.iterdir()] == ["exam.jsonl"]


def test_a_whole_file_replaces_the_old_one_or_leaves_it(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    write_rows(path, [ROWS[0]])

    def broken():
        yield ROWS[1]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(path, broken())
    assert read_rows(path) == [ROWS[0]] and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    write_text(path, "new\n")
    assert path.read_text() == "new\n" and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


SMALL = {"folder": "", "task": {"name": "gsm8k"}, "student": {"model": "m"}}


def test_a_run_goes_on_with_another_budget_and_no_other_seed(tmp_path: Path):
    config = parse_config({**SMALL, "folder": str(tmp_path / "run")})
    assert open_run(config) == tmp_path / "run"
    open_run(override(config, ["teacher.concurrency=4", "mesh.tensor=2", "train.remat=full"]))
    with pytest.raises(
        ConfigError, match=r"other settings \(seed: 42 -> 1; task.split: 'ho2023' ->"
    ):
        open_run(override(config, ["seed=1", "task.split=chilled"]))


def test_a_partial_file_beside_its_finished_one_is_dropped(tmp_path: Path):
    config = parse_config({**SMALL, "folder": str(tmp_path / "run")})
    played = open_run(config) / "round_01"
    played.mkdir()
    finished, going_on = played / "exam.jsonl", played / "dev.jsonl"
    for path in (finished, partial_path(finished), partial_path(going_on)):
        write_text(path, "{}\n")
    open_run(config)
    assert {*played.iterdir()} == {finished, partial_path(going_on)}


def hold(folder: Path, held, release) -> None:
    with lock(folder):
        held.set()
        release.wait(20)


def test_a_second_process_is_kept_out_and_told_who_works(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(20)
    with pytest.raises(ConfigError, match=f"is being worked on by process {process.pid} on "):
        lock(tmp_path).__enter__()
    release.set()
    process.join()
    with lock(tmp_path):
        pass


def test_time_adds_up_over_interruptions(tmp_path: Path):
    update_round(tmp_path, 1, rows=3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), timed(tmp_path, 1, "exam"):
            raise KeyboardInterrupt
    facts = read_round(tmp_path, 1)
    assert facts["rows"] == 3 and facts["seconds"]["exam"] >= 0.0


def test_records_that_are_not_of_their_kind_are_refused(tmp_path: Path):
    write_rows(tmp_path / "q.jsonl", [{"id": "a"}])
    with pytest.raises(ValueError, match=r"a Question row has .*got \['id'\]"):
        read_records(tmp_path / "q.jsonl", Question)
    write_records(tmp_path / "q.jsonl", [Question("a", "?", "1", "dev", "choice", ("x", "y"))])
    assert read_records(tmp_path / "q.jsonl", Question)[0].choices == ("x", "y")
