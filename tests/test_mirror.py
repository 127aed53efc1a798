"""Runs in buckets without the run: what moves when, who may write, and what a cut leaves."""

import contextlib
import itertools
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket_server import bucket_server

from distill_jax import claim, mirror
from distill_jax.bucket import Bucket, BucketError, bucket_url, local_folder
from distill_jax.config import ConfigError
from distill_jax.mirror import bring, hold, opened, push
from distill_jax.run_folder import Partial, lock, write_rows, write_text
from distill_jax.teacher.ledger import Ledger

numbers = itertools.count()


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request) -> Iterator[tuple[str, dict[str, str]]]:
    with bucket_server(request.param) as environment:
        yield request.param, environment


class Place:
    """A new place in a bucket, and machines to reach it from."""

    def __init__(self, scheme: str, homes: Path, setenv: Callable[[str, str], None]):
        self.url = f"{scheme}://lab/runs/{next(numbers)}"
        self._homes, self._setenv = homes, setenv

    def on(self, machine: str) -> Path:
        """Goes to a machine; returns the working folder there."""
        self._setenv("HOME", str(self._homes / machine))
        return local_folder(self.url)

    def names(self) -> set[str]:
        return {*Bucket(self.url).tags()}

    def age(self, seconds: float) -> None:
        """Makes the newest sign of whoever works there older."""
        bucket = Bucket(self.url)
        sign = json.loads(bucket.read(claim.OBJECT) or b"")
        bucket.write(claim.OBJECT, json.dumps(sign | {"time": sign["time"] - seconds}).encode())


@pytest.fixture
def place(server, tmp_path: Path, monkeypatch) -> Place:
    for name, value in server[1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(claim, "_SETTLE_S", 0.0)
    monkeypatch.setattr(claim, "_POLL_S", 0.01)
    return Place(server[0], tmp_path, monkeypatch.setenv)


def quiet(text: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run, but for what is no part of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and not path.name.startswith(".")
    }


def pay(folder: Path, number: int) -> None:
    with Ledger(folder / "ledger.sqlite") as ledger:
        for _ in range(number):
            intent = ledger.reserve({"prompt": str(time.time_ns())}, (0,), usd=1.0, limit_usd=None)
            assert intent is not None
            ledger.store(intent, "a paid answer", attempts=1, latency_s=0.1)


def num_copied(place: Place) -> int:
    """Answers in the bucket's ledger."""
    copy = Path.home() / "copy.sqlite"
    assert Bucket(place.url).get("ledger.sqlite", copy)
    return num_paid(copy)


def num_paid(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute("SELECT count(*) FROM answers").fetchone()[0]


@pytest.mark.parametrize("name", ["gs://lab", "az://lab/a", "gs://lab/../../a", "s3:///a", "gs://"])
def test_a_place_that_is_none_is_refused(name: str):
    with pytest.raises(ConfigError, match="gs://BUCKET/NAME"):
        local_folder(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://lab/a needs the package .*distill_jax\[bucket\]"):
        Bucket("s3://lab/a")


def test_a_bucket_that_is_not_there_is_one_sentence(place: Place):
    with pytest.raises(
        BucketError, match=r"://none/\d+ can't be .* who asks is known from "
    ) as found:
        Bucket(place.url.replace("lab/runs", "none")).write("x", b"")
    assert found.value.exit_code == 13 and "\n" not in str(found.value)


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\n--==0==", b"\0"])
def test_no_byte_is_lost(place: Place, tmp_path: Path, end: bytes):
    content = bytes(range(256)) * 40 + end
    (tmp_path / "there").write_bytes(content)
    Bucket(place.url).put(tmp_path / "there", "a/b")
    assert Bucket(place.url).get("a/b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_machines_take_turns_and_each_goes_on_where_the_last_one_ended(place: Place):
    neighbour = Bucket(f"{place.url}1")
    neighbour.write("other.txt", b"another run's")
    first = place.on("first")
    with hold(first, quiet):
        write_text(first / "config.yaml", "a: 1\n")
        part = Partial(first / "exam.jsonl")
        part.append([{"id": 1}])
        pay(first, 2)
        push()
        assert place.names() == {"lock.json", "config.yaml", "exam.partial.jsonl", "ledger.sqlite"}
        part.finish(first / "exam.jsonl")
        pay(first, 1)
    second = place.on("second")
    with hold(second, quiet):
        assert contents(second).keys() == {"config.yaml", "exam.jsonl", "ledger.sqlite"}
        assert (second / "exam.jsonl").read_bytes() == (first / "exam.jsonl").read_bytes()
        assert num_paid(second / "ledger.sqlite") == 3
        write_rows(second / "lesson.jsonl", [{"id": 2}])
        (second / "exam.jsonl").unlink()
        pay(second, 1)
    (place.on("first") / "left_over.jsonl").write_text("")
    with hold(first, quiet):
        assert contents(first).keys() == {"config.yaml", "lesson.jsonl", "ledger.sqlite"}
        assert num_paid(first / "ledger.sqlite") == 4
    (aside,) = (Path.home() / ".cache/distill_jax/runs/set_aside").rglob("left_over.jsonl")
    assert (aside.parent / "exam.jsonl").exists() and not bucket_url(aside)
    assert {*neighbour.tags()} == {"other.txt"}


def test_the_machine_that_was_last_goes_on_with_what_it_has(place: Place):
    folder = place.on("first")
    with pytest.raises(ZeroDivisionError), hold(folder, quiet):
        write_text(folder / "config.yaml", "a: 1\n")
        raise ZeroDivisionError
    write_text(folder / "exam.jsonl", "as if killed before it was copied\n")
    with hold(folder, quiet):
        assert "exam.jsonl" in contents(folder)
        assert place.names() == {"lock.json", "config.yaml", "exam.jsonl"}


def test_two_machines_never_work_on_a_run_at_once(place: Place, monkeypatch):
    monkeypatch.setattr(claim, "_SIGN_S", 0.0)
    first, said = place.on("first"), []
    taken = r"was taken by process .* The same command goes on from there"
    with pytest.raises(claim.RunTaken, match=taken), hold(first, quiet):
        write_text(first / "config.yaml", "a: 1\n")
        push()
        signing = threading.Timer(0.3, push)
        signing.start()
        second = place.on("second")
        with pytest.raises(ConfigError, match="is being worked on by process"):
            hold(second, said.append).__enter__()
        signing.join()
        assert len(said) == 1 and "was working on" in said[0]
        with pytest.raises(ConfigError, match="is being worked on by process"):
            hold(first, quiet).__enter__()
        place.age(claim.SILENT_S)
        with hold(second, quiet):
            write_text(second / "theirs.txt", "")
        write_text(first / "mine.txt", "")
        push()
    assert place.names() == {"lock.json", "config.yaml", "theirs.txt"}


def test_a_run_that_was_taken_stops_by_itself(place: Place, monkeypatch):
    monkeypatch.setattr(claim, "_SIGN_S", 0.0)
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    folder = place.on("first")
    with pytest.raises(claim.RunTaken), hold(folder, quiet):
        write_text(folder / "mine.txt", "")
        while True:  # it may sign once more without having seen this
            Bucket(place.url).write(claim.OBJECT, b'{"name": "other", "holder": "another"}')
            time.sleep(0.05)


def test_wherever_copying_is_cut_the_bucket_holds_a_run_as_it_once_was(place: Place, monkeypatch):
    """The order of the names is that in which they were written, but for the first and the last."""
    names = [
        "ledger.sqlite",
        "round_02/dev.jsonl",
        "round_01/exam.jsonl",
        "round_02/a.partial.jsonl",
    ]
    names += ["round_03/training/6/state"]
    folder = place.on("first")
    written: list[str] = []
    put = Bucket.put

    def cut(self: Bucket, path: Path, name: str) -> None:
        if len(written) == limit:
            raise BucketError("cut")
        put(self, path, name)
        written.append(name)

    with hold(folder, quiet):
        monkeypatch.setattr(Bucket, "put", cut)
        for name in [names[4], *names[1:4], names[0]]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name) if path.suffix != ".sqlite" else pay(folder, 1)
            time.sleep(0.02)
        os.utime(folder / names[2], (0, 0))  # a file that was finished last may look old
        os.utime(folder / names[3], (1, 1))
        for limit in range(len(names)):
            with pytest.raises(BucketError, match="cut"):
                push()
            assert written == names[:limit] and place.names() == {"lock.json", *written}
        limit = -1
        push()
        assert written == names


def test_what_is_new_is_copied_without_being_asked(place: Place, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    folder = place.on("first")
    with hold(folder, quiet):
        pay(folder, 1)
        while "ledger.sqlite" not in place.names():
            time.sleep(0.01)


def test_a_ledger_is_copied_whole_while_it_is_written(place: Place):
    folder = place.on("first")
    with hold(folder, quiet):
        writer = threading.Thread(target=pay, args=(folder, 60))
        with Ledger(folder / "ledger.sqlite"):  # as long as it is open, what is new is in its log
            pay(folder, 1)
            push()
            assert num_copied(place) == 1
            writer.start()
            while writer.is_alive():
                push()
                assert 0 < num_copied(place) <= 61
            writer.join()
            push()
            assert num_copied(place) == 61
    assert not [name for name in place.names() if name.endswith(("-wal", "-shm"))]


def test_weights_are_fetched_when_they_are_asked_for(place: Place):
    first = place.on("first")
    weights = ["round_00/student/model.safetensors", "round_01/checkpoint/d/a"]
    with hold(first, quiet):
        for name in ["config.yaml", "round_00/student/config.json", *weights]:
            (first / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(first / name, name)
    second = place.on("second")
    with hold(second, quiet):
        assert contents(second).keys() == {"config.yaml", "round_00/student/config.json"}
        for name in weights:
            assert (bring((second / name).parent) / Path(name).name).read_text() == name
        before = Bucket(place.url).tags()
        push()
        assert Bucket(place.url).tags() == before
        (second / weights[1]).unlink()
        push()
        assert before.keys() - place.names() == {weights[1]}
    elsewhere = place.on("third")  # a process without the run, on another host
    names = {path.name for path in bring(elsewhere / "round_00/student").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_weights_that_others_made_anew_are_fetched_anew(place: Place):
    first, reader = place.on("first"), place.on("reader")
    names = ["round_01/checkpoint/d/a", "round_01/checkpoint/d/b", "round_00/model.safetensors"]

    def train(text: str, *names: str) -> None:
        place.on("first")
        with hold(first, quiet):
            for path in first.rglob("d/*"):
                path.unlink()
            for name in ("config.yaml", *names):
                (first / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(first / name, text)
        place.on("reader")

    def read(name: str) -> str:
        return (bring((reader / name).parent) / Path(name).name).read_text()

    train("one", *names)
    with opened(reader):
        assert [read(name) for name in names] == ["one"] * 3
    with opened(reader):
        assert all((reader / name).exists() for name in names)  # and are not fetched again
    train("two", names[0], names[2])
    with hold(reader, quiet):
        assert [read(names[0]), read(names[2])] == ["two"] * 2
    assert place.names() == {"lock.json", "config.yaml", names[0], names[2]}
    assert Bucket(place.url).read(names[0]) == Bucket(place.url).read(names[2]) == b"two"


def test_readers_see_the_newest_and_what_they_add_is_kept(place: Place):
    first, reader = place.on("first"), place.on("reader")
    with pytest.raises(ConfigError, match="holds no run"), opened(reader):
        pass
    place.on("first")
    with hold(first, quiet):
        write_text(first / "config.yaml", "a: 1\n")
        pay(first, 1)
        push()
        with opened(first) as folder:
            assert folder == first
        for text in ("one", "three"):
            write_text(first / "exam.jsonl", text)
            push()
            place.on("reader")
            with opened(reader) as folder:
                assert (folder / "exam.jsonl").read_text() == text
                write_text(folder / "report.html", text)
                pay(folder, 1)  # as nobody does that holds no run
            assert num_copied(place) == 1
            place.on("first")
        pay(first, 1)
        (first / "exam.jsonl").unlink()
    place.on("reader")
    with opened(reader) as folder:
        assert contents(folder).keys() == {"config.yaml", "ledger.sqlite", "report.html"}
        assert (folder / "report.html").read_text() == "three"
        assert num_paid(folder / "ledger.sqlite") == 2
    with lock(place.on("first")), opened(first) as folder:  # a run here is read as it is
        assert "report.html" not in contents(folder)
