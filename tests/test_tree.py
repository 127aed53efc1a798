"""The tree on its lines equals the flat rectangle, for every kind of decoder."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import make_params, run, variant
from samples import APART, make_batch, make_samples

from distill_jax.packing import Grid
from distill_jax.student.model import ModelConfig
from distill_jax.student.objective import Objective
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import bind_states, put_batch
from distill_jax.student.tree import NOWHERE, Batch

SHARDS, ROWS = 2, 5
VARIANTS = ("gpt2", "gpt-neo", "gptj", "opt-350m", "gemma3", "qwen3")
"""Learned positions, windows, interleaved turns, projections, two rotary bases, normalised keys."""


@functools.cache
def states_of(config: ModelConfig):
    mesh = make_mesh(SHARDS, 1, 1)
    states = bind_states(config, mesh, compute_dtype=jnp.dtype("float32"), remat="none")

    def first(params, batch: Batch):
        return states(params, jax.tree.map(lambda x: x[0], batch._replace(counts=None)))

    return jax.jit(first), jax.device_put(make_params(config), jax.NamedSharding(mesh, jax.P()))


def find_texts(batch: Batch) -> Iterator[tuple[list[int], np.ndarray, int]]:
    """Every branch: the flat sequence, where its tokens stand on the line, and which line."""
    first = batch.shared.shape[2]
    shared = batch.tokens[0, :, :first][batch.shared[0]].tolist()
    for s, b in np.ndindex(*batch.valid.shape[1:]):
        asked = batch.questions[0, s, b]
        asked = asked[asked < NOWHERE]
        live, cut = (
            [index for part in parts for index in part[0, s, b]]
            for parts in (batch.live, batch.cut)
        )
        for place, index in enumerate((*live, *cut)):
            where = index[index < NOWHERE]
            if len(where):
                last = live[0][:1] if place >= len(live) else []
                before = batch.tokens[0, s][[*asked, *last]].tolist()
                yield shared + before + batch.tokens[0, s][where].tolist(), where, s


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 999),
    shared=st.integers(0, 7),
    count=st.integers(1, 7),
    prefix_gradient=st.booleans(),
)
def test_every_state_is_that_of_the_flat_sequence(name, seed, shared, count, prefix_gradient):
    config = variant(name)
    states, params = states_of(config)
    samples = make_samples(seed, config.vocab_size, shared, count)
    objective = Objective(prefix_gradient=prefix_gradient)
    batch = make_batch(samples, shared, objective, Grid(1, SHARDS, ROWS), APART)
    assert len(batch.live if prefix_gradient else batch.cut) == 2
    found = np.asarray(states(params, put_batch(batch, make_mesh(SHARDS, 1, 1))))
    texts = list(find_texts(batch))
    paired = 4 - prefix_gradient  # where branches are cut, the anchor's copy too
    assert len(texts) == sum(paired if item.positive else 1 for item in samples)
    flat = np.zeros((40, 40), np.int32)
    for row, (tokens, _, _) in enumerate(texts):
        flat[row, : len(tokens)] = tokens
    places = np.broadcast_to(np.arange(40), flat.shape)
    whole, _ = run(config, states_of(config)[1], flat, places, np.ones(flat.shape, bool))
    for row, (tokens, where, line) in enumerate(texts):
        expected = np.asarray(whole)[row, len(tokens) - len(where) : len(tokens)]
        np.testing.assert_allclose(found[line][where], expected, rtol=2e-4, atol=2e-5)
