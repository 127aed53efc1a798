"""Losses against references written without the code under test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.student.losses import (
    cosine_distance,
    last_state,
    prediction_costs,
    prediction_loss,
    triplet_costs,
    triplet_loss,
)


def random_rows(seed: int, rows: int = 7, width: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, width)).astype(np.float32) for _ in range(3)]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_triplet_loss_is_the_mean_over_valid_rows():
    anchor, positive, negative = random_rows(2)
    valid = np.array([True, False, True, True, False, True, True])
    rows = zip(anchor, positive, negative, valid, strict=True)
    costs = [max(0.0, 0.4 - cosine(a, p) + cosine(a, n)) for a, p, n, ok in rows if ok]
    assert any(cost == 0.0 for cost in costs) and len(set(costs)) > 2
    got = triplet_loss(*map(jnp.asarray, (anchor, positive, negative, valid)), margin=0.4)
    np.testing.assert_allclose(got, np.mean(costs), rtol=1e-6)


def test_triplet_costs_of_invalid_rows_are_zero_and_have_no_gradient():
    anchor, positive, negative = map(jnp.asarray, random_rows(1))
    valid = jnp.arange(7) % 2 == 0

    def total(anchor: jax.Array) -> jax.Array:
        return triplet_costs(anchor, positive, negative, valid, margin=2.0).sum()

    gradient = jax.grad(total)(anchor)
    assert jnp.all(gradient[1::2] == 0) and jnp.all(jnp.any(gradient[::2] != 0, axis=1))


@pytest.mark.parametrize("margin", [0.0, -0.5, 2.5])
def test_margin_outside_its_range_is_refused(margin: float):
    row = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"margin is a cosine distance in \(0, 2\]; got"):
        triplet_loss(row, row, row, jnp.ones(2, bool), margin=margin)


def test_cosine_distance_of_a_zero_state_is_finite_with_finite_gradient():
    zero, other = jnp.zeros((1, 4)), jnp.ones((1, 4))
    assert float(cosine_distance(zero, other)[0]) == 1.0
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: cosine_distance(x, other).sum())(zero)))


def test_last_state_is_that_of_the_last_real_token():
    hidden = jnp.arange(3 * 4 * 2, dtype=jnp.float32).reshape(3, 4, 2)
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    expected = jnp.stack([hidden[0, 1], hidden[1, 3], hidden[2, 0]])
    assert jnp.array_equal(last_state(hidden, mask), expected)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_costs_of_predictions_and_their_gradient_do_not_depend_on_the_chunk(chunk: int):
    rng = np.random.default_rng(2)
    hidden, head = rng.normal(size=(2, 13, 6)), rng.normal(size=(6, 9))
    targets, weights = rng.integers(0, 9, (2, 13)), rng.random((2, 13))
    scores = hidden @ head
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    wrong = np.exp(log_p) - np.eye(9)[targets]
    expected_gradient = np.einsum("std,stv->dv", hidden, weights[..., None] * wrong)

    def costs(head: jax.Array) -> jax.Array:
        arrays = (jnp.asarray(hidden, jnp.float32), jnp.asarray(targets, jnp.int32))
        return prediction_costs(*arrays, head, score, chunk=chunk)

    matrix = jnp.asarray(head, jnp.float32)
    np.testing.assert_allclose(costs(matrix), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda head: jnp.sum(costs(head) * jnp.asarray(weights)))(matrix)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=2e-5)


def score(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_loss_with_known_weights_equals_weighted_costs_in_value_and_gradients(chunk: int):
    rng = np.random.default_rng(3)
    hidden, head, weights = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 13, 6), (6, 9), (2, 13))
    )
    targets = jnp.asarray(rng.integers(0, 9, (2, 13)), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3.0 * prediction_loss(hidden, targets, head, score, weights, chunk=chunk)

    def sum_of_costs(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3.0 * jnp.sum(weights * prediction_costs(hidden, targets, head, score))

    found, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    wanted, expected = jax.value_and_grad(sum_of_costs, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose([found, loss(hidden, head)], [wanted, wanted], rtol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("known_weights", [False, True])
def test_no_array_of_all_tokens_by_vocabulary_lives(known_weights: bool):
    hidden, head, weights = jnp.ones((1, 64, 4)), jnp.ones((4, 50)), jnp.ones((1, 64))
    targets = jnp.zeros((1, 64), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        if known_weights:
            return prediction_loss(hidden, targets, head, score, weights, chunk=8)
        return jnp.sum(prediction_costs(hidden, targets, head, score, chunk=8))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head))
    assert "8,50]" in text
    assert "64,50]" not in text and "8,8,50]" not in text and "8,1,8,50]" not in text
