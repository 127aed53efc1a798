"""Weights and states survive: other layouts, broken copies, interruptions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.checkpoint import TrainingCheckpoints, load_params, save_params
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import TrainState, init_state, make_optimizer, warmup_schedule


def make_params(sizes: tuple[int, int, int]) -> dict:
    mesh = make_mesh(*sizes)
    weight = jax.random.normal(jax.random.key(0), (8, 6))
    layout = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    scale = jax.device_put(jnp.arange(6.0), NamedSharding(mesh, PartitionSpec()))
    return {"block": {"up": jax.device_put(weight, layout)}, "norm": scale}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(got, wanted) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 1)])
def test_weights_come_back_in_any_layout(tmp_path: Path, sizes):
    save_params(tmp_path / "checkpoint", make_params((1, 2, 2)))
    wanted = make_params(sizes)
    assert_equal(load_params(tmp_path / "checkpoint", abstract(wanted)), wanted)


def test_other_weights_than_asked_for_are_refused_by_name(tmp_path: Path):
    save_params(tmp_path / "checkpoint", make_params((1, 1, 1)))
    like = abstract(make_params((1, 1, 1)))
    like["block"]["up"] = jax.ShapeDtypeStruct((8, 7), jnp.float32, sharding=like["norm"].sharding)
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoint can't be read: "):
        load_params(tmp_path / "checkpoint", like)


def make_state() -> TrainState:
    params = make_params((1, 2, 2))
    optimizer = make_optimizer(warmup_schedule(1e-3, 0), 0.01)
    state, _ = init_state(params, optimizer, make_mesh(1, 2, 2))
    return state


def at_step(state: TrainState, step: int) -> TrainState:
    return jax.tree.map(lambda x: x + step, state)


def test_the_newest_state_is_restored_and_only_two_are_kept(tmp_path: Path):
    state = make_state()
    with TrainingCheckpoints(tmp_path / "training") as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        for step in (3, 6, 9):
            checkpoints.save(step, at_step(state, step))
    with TrainingCheckpoints(tmp_path / "training") as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert isinstance(restored, TrainState)
    assert_equal(restored, at_step(state, 9))
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["6", "9"]


def test_a_broken_copy_is_named_and_the_state_before_it_is_used(tmp_path: Path, caplog):
    state = make_state()
    with TrainingCheckpoints(tmp_path / "training") as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, at_step(state, step))
    for path in (tmp_path / "training" / "6").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    with TrainingCheckpoints(tmp_path / "training") as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert_equal(restored, at_step(state, 3))
    assert "training/6 can't be read" in caplog.text and "The state before it" in caplog.text
