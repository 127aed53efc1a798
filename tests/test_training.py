"""A round's training goes on where it was stopped, on whatever devices, to the same weights."""

import contextlib
import gc
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_models import LLAMA, make_params

from distill_jax import training
from distill_jax.checkpoint import TrainingCheckpoints
from distill_jax.config import parse_config
from distill_jax.config_file import override
from distill_jax.int_lists import MIN_SHARED, IntLists, Prompts
from distill_jax.progress import Advance, Progress
from distill_jax.rows import Rows
from distill_jax.run_folder import ANOTHER_FOLDER, read_rows
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import make_step, warmup_schedule
from distill_jax.training import TrainingDiverged, train_round

MODEL = replace(LLAMA, layers=2)
CONFIG = parse_config(
    {
        "folder": "-",
        "task": {"name": "gsm8k"},
        "student": {"model": "-", "compute_dtype": "float32"},
        "train": {
            "epochs": 3,
            "batch_size": 8,
            "microbatch_size": 8,
            "learning_rates": [1e-4],
            "warmup_steps": 0,
            "checkpoint_every": [100, 60.0],
        },
        "reflection": {"weight": 0.5},
    }
)
STEPS = 9  # three epochs of 24 rows


def make_rows() -> Rows:
    """Rows of one length, so that one program does for all batches."""
    rng = np.random.default_rng(6)

    def text(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, MODEL.vocab_size, size).tolist())

    beginning, count = text(MIN_SHARED), range(24)
    texts, anchors, positives, negatives = IntLists(), [], IntLists(), IntLists()
    for _ in count:
        anchors.append(texts.append(text(6)))
        positives.append([texts.append(text(5))])
        negatives.append([texts.append(text(4))])
    prompts = Prompts([(*beginning, 3, *text(2)) for _ in count])
    names = [f"t/{i}" for i in count]
    return Rows(names, prompts, texts, count, anchors, positives, negatives)


class Stopping(Progress):
    """Asks to stop, as pre-emption does, after some steps."""

    def __init__(self, after: int):
        super().__init__(quiet=True)
        self._left = after

    @contextlib.contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        with super().stage(title, total=total, unit=unit, done=done) as advance:

            def count(amount: int = 1, detail: str = "") -> None:
                advance(amount, detail)
                self._left -= amount
                if not self._left:
                    signal.raise_signal(signal.SIGTERM)

            yield count


def train(folder: Path, sizes: tuple[int, int, int], *, stop_after: int = 0) -> dict:
    """The weights after the round, fetched; or nothing if it is stopped, which it must be."""
    mesh = make_mesh(*sizes)
    stopped = pytest.raises(KeyboardInterrupt, match="saved after step") if stop_after else None
    with stopped or contextlib.nullcontext():
        trained, _ = train_round(
            CONFIG,
            MODEL,
            mesh,
            make_rows(),
            lambda: (make_params(MODEL, mesh=mesh), None),
            folder,
            round_index=1,
            progress=Stopping(stop_after),
        )
        return jax.device_get(trained)
    return {}


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "training").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def weights(undisturbed: Path) -> dict:
    return train(undisturbed, (1, 1, 1))


def figures(folder: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_second")
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in timed} for row in rows]


def test_stopped_in_mid_epoch_it_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Path, weights: dict
):
    before = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path, (1, 1, 1), stop_after=4) == {}
    assert saved(tmp_path) == ["3", "5"]  # the end of an epoch, and a step after the signal
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(tmp_path, (1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    assert figures(tmp_path) == figures(undisturbed)
    assert [row["step"] for row in figures(tmp_path)] == list(range(STEPS))


def test_it_goes_on_with_other_devices_and_layouts(tmp_path: Path, weights: dict):
    assert train(tmp_path, (1, 8, 1), stop_after=3) == {}
    assert train(tmp_path, (1, 1, 1), stop_after=2) == {}
    other = train(tmp_path, (1, 2, 2))
    for got, wanted in zip(*map(jax.tree.leaves, (other, weights)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture
def change(monkeypatch) -> Callable[..., None]:
    """Has what is trained from here on have other knobs."""

    def change(**knobs: Any) -> None:
        changed = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=knobs)})
        monkeypatch.setitem(train.__globals__, "CONFIG", changed)

    return change


def test_it_goes_on_with_less_memory(tmp_path: Path, weights: dict, change):
    assert train(tmp_path, (1, 1, 1), stop_after=4) == {}
    change(remat="full", microbatch_size=4)
    other = train(tmp_path, (1, 1, 1))
    for got, wanted in zip(*map(jax.tree.leaves, (other, weights)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_loss_that_is_no_number_says_what_to_lower_and_where_to_go_on(tmp_path: Path, change):
    change(learning_rates=(1e30,))
    with pytest.raises(TrainingDiverged, match=r"lower train\.learning_rates") as found:
        train(tmp_path, (1, 1, 1))
    assert str(found.value).endswith(f", and {ANOTHER_FOLDER}.")


def test_a_state_that_is_read_replaces_the_weights_that_the_round_began_with(
    tmp_path: Path, monkeypatch
):
    train(tmp_path, (1, 1, 1), stop_after=4)
    restore, left = TrainingCheckpoints.restore, []

    def count() -> int:
        gc.collect()
        return sum(x.shape == (MODEL.padded_vocab, MODEL.width) for x in jax.live_arrays())

    def watch(self, like):
        left.append(count())
        return restore(self, like)

    before = count()
    monkeypatch.setattr(TrainingCheckpoints, "restore", watch)
    assert train(tmp_path, (1, 1, 1))
    assert left == [before]


def test_where_no_saved_state_can_be_read_the_round_begins_anew(tmp_path: Path, weights: dict):
    train(tmp_path, (1, 1, 1), stop_after=4)
    for path in (tmp_path / "training").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    jax.tree.map(np.testing.assert_array_equal, train(tmp_path, (1, 1, 1)), weights)
    assert [row["step"] for row in figures(tmp_path)] == list(range(STEPS))


def test_nothing_of_a_step_is_read_before_the_next_is_on_its_way(tmp_path: Path, monkeypatch):
    events = []

    class Rate:
        """A learning rate that tells when somebody waits for it."""

        def __init__(self, index: int):
            self.index = index

        def __array__(self, *_, **__) -> np.ndarray:
            events.append(("read", self.index))
            return np.array(1e-4, np.float32)

    def schedule(step):
        return Rate(step) if isinstance(step, int) else warmup_schedule(1e-4, 0)(step)

    def make(*args, **settings):
        step = make_step(*args, **settings)

        def send(*arrays):
            events.append(("sent", sum(kind == "sent" for kind, _ in events)))
            return step(*arrays)

        return send

    monkeypatch.setattr(training, "warmup_schedule", lambda *_: schedule)
    monkeypatch.setattr(training, "make_step", make)
    train(tmp_path, (1, 1, 1))
    at = {event: place for place, event in enumerate(events)}
    waited = [i for i in range(STEPS - 1) if at["read", i] < at["sent", i + 1]]
    assert waited == [2, 5]  # the ends of epochs, where all is saved
    assert len(events) == 2 * STEPS


def test_dpo_begins_at_its_reference_in_half_precision_too(tmp_path: Path, monkeypatch):
    changes = ["reflection.objective=dpo", "student.compute_dtype=bfloat16", "train.epochs=1"]
    monkeypatch.setitem(train.__globals__, "CONFIG", override(CONFIG, changes))
    monkeypatch.setitem(train.__globals__, "MODEL", replace(MODEL, query_key_norm=True))
    train(tmp_path, (1, 1, 1))
    assert figures(tmp_path)[0]["reflection_loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_minutes_alone_save_too(tmp_path: Path, change):
    change(checkpoint_every=(100, 1e-6))
    assert train(tmp_path, (1, 1, 1), stop_after=5) == {}
    assert saved(tmp_path) == ["5", "6"]
