"""Programs compiled for TPUs that are not here. Compiling needs libtpu, the extra `tpu`."""

import importlib.util

import jax
import pytest
from test_fit import MODEL, TEXTS, config

from distill_jax.config import ConfigError
from distill_jax.layouts import num_weights
from distill_jax.plan import topology
from distill_jax.plan.fit import Student, compile_programs
from distill_jax.plan.topology import count_chips, find_topology, larger
from distill_jax.plan.work import count_round
from distill_jax.student.architecture import ModelConfig
from distill_jax.student.model import abstract_params
from distill_jax.student.sharding import make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'distill_jax[tpu]'",
)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5e:4x5", "v5e slices are 1x1, .*; the nearest is v5e:4x4"),
        ("v5e:4x4x4", "the nearest is v5e:8x8"),
        ("v5p:3x3x3", "the nearest is v5p:2x4x4"),
        ("v6e:32x32", "the nearest is v6e:16x16"),
        ("v9:2x2", "--topology is v5e, v6e, v5p and a shape, such as v5e:4x4"),
        ("v5e", "got 'v5e'"),
    ],
)
def test_wrong_names_get_the_nearest(name: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        find_topology(name)


def test_larger_slices_of_a_kind():
    assert list(larger("v5e:8x8")) == ["v5e:8x16", "v5e:16x16"]
    assert count_chips("v5p:4x4x8") == 128 and count_chips("v5e:16x16*4") == 256


WIDE = ModelConfig(  # nearly nothing is padded on a TPU
    vocab_size=1024,
    width=512,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=128,
    mlp_width=1024,
    max_positions=256,
    tied_head=True,
)


def student(model: ModelConfig, settings) -> Student:
    return Student(model, TEXTS, count_round(settings, model, TEXTS))


@needs_libtpu
def test_the_real_step_is_compiled():
    settings = config(mesh={"data": 1, "fsdp": 4, "tensor": 1})
    compiled = compile_programs(settings, student(WIDE, settings), "v5e:2x2", answers=True)
    matrices = num_weights(abstract_params(WIDE)) - 7 * 512
    held = 12 * (matrices / 4 + 7 * 512)  # weights and moments; gradients live in between
    assert held <= compiled.step.held <= 1.1 * held
    assert compiled.devices == 4 and compiled.layout.axes == (1, 4, 1)
    useful = compiled.useful_flops / 4
    assert useful <= compiled.step.work.flops <= 3 * useful, "padding is computed too"
    kinds = {(each.kind, each.axes) for each in compiled.step.exchanges}
    assert any(axes == "fsdp" for _, axes in kinds)
    assert not any(each.crosses for each in compiled.step.exchanges)
    assert compiled.answers is not None and compiled.rows % 8 == 0
    assert compiled.step.roofline <= compiled.step.in_turn
    low, high = compiled.utilisation
    assert 0 < low <= high < 1


def test_a_libtpu_that_jax_cannot_read_is_named(monkeypatch):
    class Unreadable(jax.stages.Compiled):
        def __init__(self):
            pass

        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr("importlib.metadata.version", {"libtpu": "9.9"}.get)
    with pytest.raises(ConfigError, match=r"can't read what libtpu 9.9 compiled; .* 'jax\[tpu\]'"):
        topology._text(Unreadable())


@needs_libtpu
def test_slices_are_told_apart_along_the_data_axis():
    devices = find_topology("v5e:2x2*2").devices
    grid = make_mesh(4, 2, 1, devices=devices).devices
    slices = [[{device.slice_index for device in copy.flat} for copy in half]
              for half in (grid[:2], grid[2:])]  # fmt: skip
    assert slices == [[{0}, {0}], [{1}, {1}]]
    with pytest.raises(ValueError, match=r"mesh.data must be a multiple of the 2 slices"):
        make_mesh(1, 8, 1, devices=devices)


@needs_libtpu
def test_a_row_of_a_torus_may_be_shared_by_two_axes():
    devices = find_topology("v5p:4x4x4").devices
    grid = make_mesh(32, 2, 1, devices=devices).devices
    for pair in grid.reshape(32, 2).tolist():
        differs = [abs(a - b) for a, b in zip(*(device.coords for device in pair), strict=True)]
        assert sorted(differs) == [0, 0, 1], "neighbours share what is exchanged most"


@needs_libtpu
def test_what_has_no_room_says_how_much_and_what_has():
    settings = config()
    wide = ModelConfig(**{**vars(MODEL), "width": 8192, "mlp_width": 32768, "layers": 2})
    with pytest.raises(ConfigError) as error:
        compile_programs(settings, student(wide, settings), "v5e:1x1", answers=False)
    words = str(error.value)
    assert "the training step needs" in words and "GB on each device and has 1" in words
    assert "The nearest that fits, by our count:" in words and "devices" in words
