"""The mesh, and the tables from logical axes to its axes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from random_models import GPT2, LLAMA

from distill_jax.student.model import abstract_params, logical_axes
from distill_jax.student.sharding import EXAM_RULES, TRAIN_RULES, make_mesh, shardings


def test_one_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(1, 1, 2).shape) == {"data": 1, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((3, -1, 1), "data=3 x fsdp=-1 x tensor=1 does not fit the 8 devices"),
        ((16, 1, 1), "does not fit the 8 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "are 1 or more"),
        ((1, -2, 1), "are 1 or more"),
        ((-2, -2, 1), "are 1 or more"),
        ((1, -1, 16), "does not fit the 8 devices"),
    ],
)
def test_grids_that_do_not_fit_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_mesh(*sizes)


def spec(axes, shape, rules=TRAIN_RULES, mesh_sizes=(2, 2, 2)):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    return shardings(make_mesh(*mesh_sizes), axes, leaf, rules).spec


def test_rules_lay_axes_and_keep_whole_what_does_not_divide():
    assert spec(("layers", "embed", "mlp"), (3, 8, 6)) == P(None, "fsdp", "tensor")
    assert spec(("layers", "embed", "mlp"), (3, 8, 7)) == P(None, "fsdp", None)
    assert spec(("layers", "embed", "mlp"), (3, 8, 6), EXAM_RULES) == P(None, None, "tensor")
    assert spec(("embed", "kv_heads", "head_dim"), (8, 2, 4), mesh_sizes=(1, 2, 4)) == P(
        "fsdp", None, None
    )


def test_rules_that_do_not_work_are_refused():
    with pytest.raises(ValueError, match="'colour' is in no rule; known: layers"):
        spec(("colour",), (8,))
    with pytest.raises(ValueError, match=r"two axes .* on one mesh axis"):
        spec(("heads", "kv_heads"), (8, 8))


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_training_stores_every_matrix_once_over_fsdp(config):
    mesh, axes, shapes = make_mesh(2, 2, 2), logical_axes(config), abstract_params(config)
    named = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    train, exam = (
        [tuple(laid.spec) for laid in jax.tree.leaves(shardings(mesh, axes, shapes, rules))]
        for rules in (TRAIN_RULES, EXAM_RULES)
    )
    assert [("embed" in names) for names in named] == [("fsdp" in spec) for spec in train]
    assert not any("fsdp" in spec for spec in exam)
    assert any("tensor" in spec for spec in exam)
