"""Figures reach the trackers, and a tracker that fails stops nothing."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from distill_jax.config import ConfigError
from distill_jax.sinks import check_sinks, open_sinks

ROWS = [{"round": 1, "step": step, "loss": 1.0 / (step + 1), "flops": 5.0} for step in range(3)]


def read_events(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard would show: tag, step, value; a later value of a step wins."""
    pytest.importorskip("tensorboardX", reason="needs the extra `sinks`")
    event_type: Any = import_module("tensorboardX.proto.event_pb2").Event
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = event_type.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return [(tag, step, value) for (tag, step), value in found.items()]


def test_tensorboard_gets_every_figure_once_over_an_interruption(tmp_path: Path):
    folder, notes = tmp_path / "run" / "round_01", []
    for rows, done in ((ROWS[:2], 0), (ROWS[1:], 1)):
        with open_sinks(["tensorboard"], folder, done=done, note=notes.append) as send:
            for row in rows:
                send(row)
    found = read_events(tmp_path / "run" / "tensorboard" / "round_01")
    wanted = [(key, row["step"], row[key]) for row in ROWS for key in ("loss", "flops")]
    assert sorted(found) == [
        (tag, step, pytest.approx(value)) for tag, step, value in sorted(wanted)
    ]
    assert notes == []


def test_wandb_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="needs the extra `sinks`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, notes = tmp_path / "run" / "round_02", []
    folder.mkdir(parents=True)
    with open_sinks(["wandb"], folder, done=0, note=notes.append) as send:
        for row in ROWS:
            send(row)
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # its service writes the file a moment after the run ends
    while b"0.3333333333333333" not in (data := log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert notes == []
    assert b"run round_02" in data and all(str(row["loss"]).encode() in data for row in ROWS)


def test_a_sink_that_fails_is_told_of_and_stops_nothing(tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="needs the extra `sinks`")
    (tmp_path / "tensorboard").write_text("a file where a folder should be made")
    notes = []
    with open_sinks(["tensorboard"], tmp_path / "round_01", done=0, note=notes.append) as send:
        for row in ROWS:
            send(row)
    (note,) = notes
    assert note.startswith("tensorboard failed, and gets no more figures: ")


def test_a_sink_that_is_not_installed_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill_jax.sinks._PACKAGES", {"wandb": "no_such_package"})
    with pytest.raises(ConfigError, match="--sink wandb needs the package no_such_package"):
        check_sinks(["wandb"])
