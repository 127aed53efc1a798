"""Raw files: downloads, checksums, no network, and preparations that are interrupted."""

import dataclasses
import fcntl
import functools
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_jax.config import TaskConfig
from distill_jax.questions import QuestionsError, load_questions, prepare, prepared, raw_files
from distill_jax.questions.published import SETS

MULTIARITH = {"train": 420, "test": 180}


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def publish(monkeypatch: pytest.MonkeyPatch, name: str, port: int) -> None:
    """Moves the addresses of a set to this machine."""
    files = {
        source: dataclasses.replace(file, address=f"http://127.0.0.1:{port}/{file.name}")
        for source, file in SETS[name].files.items()
    }
    monkeypatch.setitem(SETS, name, dataclasses.replace(SETS[name], files=files))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def published_folder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder that is served over HTTP, and the port."""
    folder = tmp_path / "published"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, server.server_address[1]
        server.shutdown()
        thread.join()


def test_download_then_no_network_needed(
    shared: Path,
    tmp_path: Path,
    published_folder: tuple[Path, int],
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, port = published_folder
    shutil.copyfile(shared / "data/multiarith/MultiArith.json", folder / "MultiArith.json")
    publish(monkeypatch, "multiarith", port)
    data_dir = tmp_path / "data"
    task = TaskConfig(name="multiarith", dev_fraction=0)
    questions = load_questions(task, seed=0, data_dir=data_dir)
    assert len(questions) == 600
    publish(monkeypatch, "multiarith", closed_port)
    assert prepare("multiarith", data_dir=data_dir) == MULTIARITH
    shutil.rmtree(data_dir / "published_questions")  # the download itself is kept
    assert load_questions(task, seed=0, data_dir=data_dir) == questions
    assert capfd.readouterr() == ("", ""), "stdout is for results, and nothing went wrong"


def test_no_network(tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "gsm8k", closed_port)
    start = time.monotonic()
    with pytest.raises(QuestionsError) as caught:
        load_questions(TaskConfig(name="gsm8k"), seed=0, data_dir=tmp_path)
    assert time.monotonic() - start < 10, "a TFDS download would retry for minutes"
    assert f"can't download http://127.0.0.1:{closed_port}/train.jsonl: " in str(caught.value)
    assert "refused" in str(caught.value)
    assert "`distill-jax data prepare gsm8k --from DIR`" in str(caught.value)


def test_a_host_that_never_comes_to_the_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_files, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                for _ in range(30):  # each byte starts the timeout of the socket anew
                    connection.sendall(b"H")
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        publish(monkeypatch, "gsm8k", server.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(QuestionsError, match=r"train\.jsonl: no answer within 0\.3 seconds"):
            prepare("gsm8k", data_dir=tmp_path)
        assert time.monotonic() - start < 2
        thread.join()


def test_an_address_that_is_gone(
    tmp_path: Path, published_folder: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "svamp", published_folder[1])
    with pytest.raises(QuestionsError, match=r"404.*prepare svamp --from DIR"):
        prepare("svamp", data_dir=tmp_path)


def test_wrong_checksums_are_refused(
    shared: Path,
    tmp_path: Path,
    published_folder: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, port = published_folder
    (folder / "SVAMP.json").write_text("[]")
    publish(monkeypatch, "svamp", port)
    found = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # of []
    expected = SETS["svamp"].files["all"].sha256
    for source in (None, folder):
        message = rf"SVAMP\.json is not the published .*{expected} expected, {found} found"
        with pytest.raises(QuestionsError, match=message):
            prepare("svamp", data_dir=tmp_path / "data", source=source)
    assert not list((tmp_path / "data").rglob("SVAMP.json")), "refused bytes are not kept"
    (folder / "right").mkdir()
    shutil.copyfile(shared / "data/svamp/SVAMP.json", folder / "right/SVAMP.json")
    counts = prepare("svamp", data_dir=tmp_path / "data", source=folder)
    assert counts == {"train": 700, "test": 300}
    shutil.rmtree(folder / "right")
    with pytest.raises(QuestionsError, match="is not the published"):
        prepare("svamp", data_dir=tmp_path / "data", source=folder)


def test_the_folder_may_be_the_sets_own_or_the_one_above(shared: Path, tmp_path: Path) -> None:
    for number, source in enumerate((shared / "data", shared / "data/multiarith")):
        assert prepare("multiarith", data_dir=tmp_path / str(number), source=source) == MULTIARITH
    with pytest.raises(QuestionsError, match=r"there is no MultiArith\.json in .*svamp or one"):
        prepare("multiarith", data_dir=tmp_path / "2", source=shared / "data/svamp")
    with pytest.raises(QuestionsError, match=r"raw files does not exist: .*none"):
        prepare("multiarith", data_dir=tmp_path / "2", source=tmp_path / "none")


PREPARE = """
import sys
from pathlib import Path
from distill_jax.questions import prepare
prepare(sys.argv[1], data_dir=Path(sys.argv[2]), source=Path(sys.argv[3]))
"""


def test_a_killed_preparation_is_not_taken_for_a_set(
    shared: Path, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = tmp_path / "published_questions/gsm8k"
    command = [sys.executable, "-c", PREPARE, "gsm8k", str(tmp_path), str(shared / "data")]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not list(sets.glob("*incomplete*/*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "killed too late to show anything"
    assert list(sets.glob("*incomplete*/*")) and not list(sets.glob("1.*"))
    publish(monkeypatch, "gsm8k", closed_port)
    task = TaskConfig(name="gsm8k", dev_fraction=0)
    questions = load_questions(task, seed=0, data_dir=tmp_path)  # from the raw files it had kept
    assert len(questions) == 7473 + 1319


def test_a_torn_raw_file_is_not_taken_for_the_download(
    shared: Path, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "multiarith", closed_port)
    kept = tmp_path / "raw/multiarith_ho2023/MultiArith.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes((shared / "data/multiarith/MultiArith.json").read_bytes()[:-1])
    with pytest.raises(QuestionsError, match="can't download"):
        prepare("multiarith", data_dir=tmp_path)


def test_one_at_a_time(shared: Path, tmp_path: Path) -> None:
    prepare_one = functools.partial(
        prepared.prepare, "multiarith", split="ho2023", data_dir=tmp_path, source=shared / "data"
    )
    with open(tmp_path / ".lock", "w") as other, ThreadPoolExecutor() as pool:
        fcntl.flock(other, fcntl.LOCK_EX)  # as if another process were at it
        counts = pool.submit(prepare_one)
        with pytest.raises(TimeoutError):
            counts.result(timeout=1)
        assert not (tmp_path / "raw").exists()
        fcntl.flock(other, fcntl.LOCK_UN)
        assert counts.result(timeout=60) == MULTIARITH


def test_addresses_and_checksums(shared: Path) -> None:
    sums = (shared / "data/SHA256SUMS").read_text()
    for name, published in SETS.items():
        for file in published.files.values():
            assert f"{file.sha256}  data/{name}/{file.name}\n" in sums
            assert re.fullmatch(rf"https://\S+/{re.escape(file.name)}", file.address)
