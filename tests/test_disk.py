"""Disks that are full, files that can't be written or were changed: nothing paid is lost."""

import asyncio
import errno
import os
import resource
import shutil
import sqlite3
from collections import Counter, namedtuple
from pathlib import Path
from random import Random

import pytest
from asked import Outcome, asks, config
from fault_server import Call, Says, chat, choice, fault_server, good
from paid_lesson import QUICK, start, sums, teach

from distill_jax import run_folder
from distill_jax.teacher import clerk
from distill_jax.teacher.audit import read_totals
from distill_jax.teacher.clerk import Clerk, Reserve, pour
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger

HERE = Path(__file__).parent


def wordy(call: Call) -> Says:
    """Right answers of 40 KB."""
    texts = [("So. " * 5000) + text for text in sums(call.prompt, call.n)]
    choices = [choice(text, index=k) for k, text in enumerate(texts)]
    return Says(body=chat(call, choices=choices), delay_s=0.02)


def test_25_a_limit_on_file_sizes_stops_the_run_and_loses_no_answer(tmp_path: Path):
    path, size = tmp_path / "ledger.sqlite", 300

    with fault_server(wordy) as (server, url):
        process = start(path, url, size)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 13, err
        assert "can't be written" in err and "Traceback" not in err
        stopped_after = len(server.calls)
        assert 50 < stopped_after < size
        assert path.with_name("ledger.sqlite.reserve").exists()
        teach(path, url, size)
    assert set(Counter(server.prompts).values()) == {1}  # what was answered is never asked again
    assert read_totals(path).num_answers == size
    assert not path.with_name("ledger.sqlite.reserve").exists()


def test_25_with_little_room_left_nothing_is_asked(tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 31 << 20))
    with fault_server(good) as (server, url), Ledger(tmp_path / "l") as ledger:
        client = TeacherClient(config(), ledger, url=url, free=True, patience=QUICK)
        with pytest.raises(OSError, match="has 31 MiB left") as caught:
            client.complete(asks(["p"]))
        assert caught.value.errno == errno.ENOSPC
        assert server.calls == [] and read_totals(tmp_path / "l").num_requests == 0
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 33 << 20))
        client.complete(asks(["p"]))
        assert len(server.calls) == 1


def test_25_a_folder_that_can_not_be_written_is_said_before_anything_is_asked(tmp_path: Path):
    with fault_server(good) as (server, url):
        process = start(Path("/proc/ledger.sqlite"), url, 5)  # not even for root
        _, err = process.communicate(timeout=60)
    assert process.returncode == 13 and "can't be written" in err, err
    assert server.calls == []


def test_25_the_reserve_holds_its_room_and_gives_it_back(tmp_path: Path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        with Clerk(path):
            reserve = path.with_name("l.reserve")
            assert reserve.stat().st_blocks * 512 >= 4 << 20  # no hole
        assert not reserve.exists()
        kept, lost = (ledger.reserve({"p": i}, [0], usd=0.5, limit_usd=None) for i in range(2))
        held = Reserve(reserve)
        held.keep({"intent": kept, "raw": "ü", "attempts": 1, "latency_s": 0.0})
        with pytest.raises(OSError, match="no room for another"):
            held.keep({"intent": lost, "raw": "x" * (4 << 20), "attempts": 1, "latency_s": 0.0})
        held.close()
        with reserve.open("r+b") as file:  # a third one that was cut short by a power failure
            file.seek(held._used)
            file.write(b'{"intent": 2, "ra')
        pour(ledger)
        assert not reserve.exists()
        pour(ledger)  # nothing to do
    totals = read_totals(path)
    assert (totals.num_answers, totals.num_open) == (1, 2)


def test_25_a_job_that_fails_fails_alone(tmp_path: Path):
    async def both(clerk: Clerk) -> list:
        jobs = [
            clerk.write(lambda ledger: ledger.reserve({"p": 1}, [0], usd=0.0, limit_usd=None)),
            clerk.write(lambda ledger: ledger.fail(99, "x", "", usd=0.0)),
            clerk.write(lambda ledger: ledger.reserve({"p": 2}, [0], usd=0.0, limit_usd=None)),
        ]
        return await asyncio.gather(*jobs, return_exceptions=True)

    with Clerk(tmp_path / "l") as writer:
        first, bug, second = asyncio.run(both(writer))
    assert isinstance(bug, AssertionError)
    assert {type(first), type(second)} == {int}
    assert read_totals(tmp_path / "l").num_open == 2


def test_entries_share_their_way_to_the_disk(tmp_path: Path, monkeypatch):
    groups = []
    enter = clerk._enter
    monkeypatch.setattr(
        clerk,
        "_enter",
        lambda ledger, entries: (groups.append(len(entries)), enter(ledger, entries)),
    )

    async def many(writer: Clerk) -> list[int | None]:
        return await asyncio.gather(
            *(
                writer.write(
                    lambda ledger, i=i: ledger.reserve({"p": i}, [0], usd=1.0, limit_usd=50.0)
                )
                for i in range(200)
            )
        )

    with Clerk(tmp_path / "l") as writer:
        given = asyncio.run(many(writer))
    assert sum(groups) == 200 and len(groups) < 50
    assert len({intent for intent in given if intent is not None}) == 50  # never over the budget


def test_32_a_changed_answer_is_reported_and_asked_again(tmp_path: Path, caplog):
    out = Outcome(tmp_path, good, ["p", "q"], url="tutor")
    with sqlite3.connect(out.path) as database:
        database.execute("UPDATE answers SET raw = replace(raw, '0 to p', '1 to p')")
    database.close()
    again = out.again(good, ["p", "q"], url="tutor")
    assert again.server.prompts == ["p"] and again.texts == out.texts
    assert any("was changed after it came" in record.getMessage() for record in caplog.records)


def test_32_any_flipped_byte_is_noticed_or_harmless(tmp_path: Path):
    out = Outcome(tmp_path, good, [f"p{i}" for i in range(40)], url="tutor")
    with sqlite3.connect(out.path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    whole, random, refused = out.path.read_bytes(), Random(3), 0
    expected = out.texts
    for _ in range(60):
        place = random.randrange(len(whole))
        torn = bytearray(whole)
        torn[place] ^= 1 << random.randrange(8)
        for path in tmp_path.glob("ledger.sqlite*"):
            path.unlink()
        out.path.write_bytes(torn)
        try:
            again = out.again(good, [f"p{i}" for i in range(40)], url="tutor")
        except ValueError as error:
            assert "damaged" in str(error) or "schema" in str(error)
            refused += 1
        else:
            assert again.texts == expected
    assert refused < 60


def test_23_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number)))
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (done.append("rename"), rename(path, to))[1]
    )
    run_folder.write_text(tmp_path / "x", "text")
    assert done == ["sync", "rename", "sync"]
