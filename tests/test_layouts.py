"""Which grid a run gets, by figures worked out by hand."""

import jax
import pytest
from random_models import LLAMA, variant

from distill_jax.config import ConfigError, MeshConfig, parse_config
from distill_jax.layouts import choose_layout, num_weights, open_mesh, state_bytes
from distill_jax.student.architecture import Lora, ModelConfig
from distill_jax.student.model import abstract_params

GPTJ = ModelConfig(
    vocab_size=50400,
    width=4096,
    layers=28,
    heads=16,
    kv_heads=16,
    head_dim=256,
    mlp_width=16384,
    max_positions=2048,
    norm="layer",
    parallel=True,
    shared_norm=True,
    activation="gelu_new",
    gated_mlp=False,
    rotary_dims=64,
    rotary_interleaved=True,
    mlp_bias=True,
    head_bias=True,
)
V5E, V5P, V6E = (gib * 2.0**30 for gib in (16, 95, 32))


def axes(rows: int, devices: int, memory: float | None, *, slices: int = 1, model=GPTJ, **asked):
    layout = choose_layout(
        MeshConfig(**asked), model, rows=rows, devices=devices, slices=slices, memory=memory
    )
    return layout.axes


def test_the_state_is_sixteen_bytes_a_weight_and_four_where_it_is_not_trained():
    attention, mlp = 4 * 4096 * 4096, 2 * 4096 * 16384 + 16384 + 4096
    block = attention + mlp + 2 * 4096
    head = 50432 * 4096 + 50432  # rows padded to a multiple of 128
    weights = 28 * block + 50432 * 4096 + head + 2 * 4096
    assert num_weights(abstract_params(GPTJ)) == weights
    assert state_bytes(GPTJ) == 16 * weights
    adapted = variant("llama-relu")
    plain = num_weights(abstract_params(adapted))
    lora = Lora(rank=2, alpha=1.0, targets=("up",))
    trained = adapted.layers * 2 * (adapted.width + adapted.mlp_width)
    found = state_bytes(ModelConfig(**{**vars(adapted), "lora": lora}))
    assert found == 4 * (plain + trained) + 12 * trained


def test_weights_are_spread_over_no_more_devices_than_half_of_the_memory_needs():
    # 96.9 GB: 16 devices of 17.2 GB need 12 or more, of 102 GB 2, of 34.4 GB 6.
    assert axes(64, 16, V5E) == (1, 16, 1)
    assert axes(256, 64, V5P) == (32, 2, 1)
    assert axes(1024, 256, V6E) == (32, 8, 1)
    assert axes(64, 16, 1e12) == (16, 1, 1)
    assert axes(64, 16, None) == (1, 16, 1)


def test_devices_that_have_no_rows_share_products():
    assert axes(4, 16, 1e12) == (4, 1, 4)
    assert axes(16, 256, V6E) == (16, 1, 16)
    assert axes(1, 3, 1e12) == (3, 1, 1), "16 heads can't be shared by three"


def test_sizes_that_are_set_stay():
    assert axes(64, 16, V5E, tensor=2) == (1, 8, 2)
    assert axes(64, 16, V5P, fsdp=4) == (4, 4, 1)
    assert axes(64, 16, V5E, data=1, fsdp=8, tensor=1) == (1, 8, 1)
    with pytest.raises(ConfigError, match=r"data=-1 x fsdp=3 x tensor=-1 does not fit 16 devices"):
        axes(64, 16, V5E, fsdp=3)


def test_only_copies_lie_on_different_slices():
    assert axes(64, 32, V5E, slices=2) == (2, 16, 1)
    assert axes(64, 32, None, slices=2) == (2, 16, 1)
    with pytest.raises(ConfigError, match="in 2 slices, which data has to count"):
        axes(64, 32, V5E, slices=2, data=1)


def test_the_line_says_why():
    layout = choose_layout(MeshConfig(), GPTJ, rows=64, devices=16, memory=V5E)
    assert str(layout) == (
        "data=1 x fsdp=16 x tensor=1: weights, moments and gradients take 6.05 GB of the 17 of a "
        "device; each device computes 4 of 64 rows at a time."
    )
    idle = choose_layout(MeshConfig(tensor=1), GPTJ, rows=4, devices=16, memory=V5P)
    assert "a microbatch of 4 rows leaves 12 of 16 parts idle" in str(idle)


def test_a_run_gets_a_mesh_of_all_devices():
    config = parse_config({"folder": "-", "task": {"name": "gsm8k"}, "student": {"model": "m"}})
    mesh, layout = open_mesh(config, LLAMA)
    assert mesh.size == jax.device_count()
    assert tuple(mesh.shape.values()) == layout.axes == (1, jax.device_count(), 1)
