"""Every family in training: the real step on four devices is the step on one."""

import jax
import numpy as np
import optax
import pytest
from random_models import variant
from samples import assert_same_training, make_batch, make_samples
from test_step import train

from distill_jax.packing import Grid
from distill_jax.student.objective import Objective
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import make_optimizer, put_batch, warmup_schedule

FAMILIES = [
    *("gpt2", "gpt-neo", "gptj", "opt-350m", "gpt-neox", "llama-3"),
    *("qwen2", "qwen3", "gemma2", "gemma3", "mistral"),
]


@pytest.fixture(autouse=True)
def quick_compilation():
    """Compiling takes nearly all the time here, and half as long without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def take_two_steps(name: str, mesh, shards: int):
    """The last state, on the host; the losses and the means of gradients after every step."""
    config, objective = variant(name), Objective()
    optimizer = make_optimizer(warmup_schedule(1e-4, 0), 0.01)
    state, step = train(config, objective, mesh, optimizer)
    losses, means = [], []
    for seed in range(2):
        samples = make_samples(seed, config.vocab_size, 4)
        batch = make_batch(samples, 4, objective, Grid(1, shards, 6 // shards + 1))
        state, figures = step(state, put_batch(batch, mesh))
        losses.append(float(figures["loss"]))
        means.append(jax.device_get(optax.tree.get(state.opt_state, "mu")))
    up = state.params["blocks"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size == up.size // mesh.size
    return jax.device_get(state), losses, means


@pytest.mark.parametrize("name", FAMILIES)
def test_four_devices_take_the_same_two_steps_as_one(name):
    one, losses, means = take_two_steps(name, make_mesh(1, 1, 1), 1)
    four, others, _ = take_two_steps(name, make_mesh(1, 2, 2), 2)
    assert losses[1] != losses[0]
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert_same_training(one, four, means)
