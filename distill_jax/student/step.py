"""The training step: two losses, one update.

Letters: B rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.lora import join
from distill_jax.student.model import ModelConfig, Params, Remat, run_blocks
from distill_jax.student.objective import Losses, Objective, States, losses
from distill_jax.student.plain import AnyBatch, plain_states
from distill_jax.student.sharding import BATCH
from distill_jax.student.tree import tree_states


class TrainState(NamedTuple):
    """Everything that the step updates."""

    step: Int[Array, ""]
    params: Params  # those that are trained: all of them, or adapters
    opt_state: optax.OptState


def warmup_schedule(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """Logarithmic warmup from 0, then constant: `rate * ln(t + 1) / ln(warmup_steps)`.

    Source: DeepSpeed's WarmupLR, which the original trains with. Half the rate is reached at the
    square root of the warmup, and step 0 leaves the weights as they are. With `warmup_steps` of 0
    or 1 the rate is constant from the first step.

    Example:
      >>> float(warmup_schedule(1.0, 100)(9)), float(warmup_schedule(1.0, 0)(0))
      (0.5, 1.0)
    """

    def schedule(step: ArrayLike) -> Array:
        if warmup_steps <= 1:
            return jnp.asarray(learning_rate, jnp.float32)
        share = jnp.log(jnp.asarray(step, jnp.float32) + 1.0) / math.log(warmup_steps)
        return learning_rate * jnp.minimum(share, 1.0)

    return schedule


def make_optimizer(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW as the original sets it: decay on every weight, no clipping."""
    return optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)


def gradients(
    config: ModelConfig,
    params: Params,
    batch: AnyBatch,
    objective: Objective,
    *,
    states: States,
    frozen: Params | None = None,
    reference: Params | None = None,
) -> tuple[Params, dict[str, Array]]:
    """The gradient of the combined loss, and both losses.

    The loss is `lm / predicted tokens + weight * reflection / valid rows`, each sum over the whole
    batch. The counts are known beforehand, so microbatches add up to exactly the gradient of the
    whole batch and never to a mean of means. Args as in `objective.losses`; `batch` has its axis M,
    and `frozen` is what `params` and `reference` are a part of, if there is more to a student.
    """
    counts, rest = batch.counts, frozen or {}
    before = None if reference is None else join(rest, reference)

    def loss_fn(params: Params, part: AnyBatch) -> tuple[Array, Losses]:
        whole = join(rest, params)
        sums = losses(config, whole, part, objective, states=states, reference=before)
        lm = sums.lm / counts.predicted
        reflection = sums.reflection / jnp.maximum(counts.valid, 1.0)
        return lm + objective.reflection_weight * reflection, Losses(lm, reflection)

    def add(total: tuple[Params, Losses], part: AnyBatch) -> tuple[tuple[Params, Losses], None]:
        grads, parts = jax.grad(loss_fn, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, (grads, parts)), None

    if batch.tokens.shape[0] == 1:
        grads, parts = jax.grad(loss_fn, has_aux=True)(params, _without_counts(batch, 0))
    else:
        zero = (jax.tree.map(jnp.zeros_like, params), Losses(*(jnp.zeros(()),) * 2))
        (grads, parts), _ = jax.lax.scan(add, zero, _without_counts(batch))
    return grads, {
        "loss": parts.lm + objective.reflection_weight * parts.reflection,
        "lm_loss": parts.lm,
        "reflection_loss": parts.reflection,
        "gradient_norm": optax.tree.norm(grads),
        "valid_share": counts.valid / jnp.maximum(counts.real, 1.0),
        "useful_tokens": counts.useful,
    }


def _without_counts(batch: AnyBatch, index: int | None = None) -> AnyBatch:
    """What has an axis M, or one microbatch of it."""
    rest = batch._replace(counts=None)  # pyright: ignore
    return rest if index is None else jax.tree.map(lambda x: x[index], rest)


def train_step(
    state: TrainState,
    batch: AnyBatch,
    frozen: Params | None = None,
    reference: Params | None = None,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    states: States,
) -> tuple[TrainState, dict[str, Array]]:
    """One update: state and batch in, state and figures out.

    Args:
      state: What is updated.
      batch: From `put_batch`.
      frozen: Weights that are used and not trained; None where all are trained.
      reference: As `state.params` was when the round began, `model.narrow` or not; DPO only.
      config, optimizer, objective, states: As in `make_step`.
    """
    grads, figures = gradients(
        config, state.params, batch, objective, states=states, frozen=frozen, reference=reference
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), figures  # pyright: ignore


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    mesh: Mesh,
    state_shardings: TrainState,
    compute_dtype: jnp.dtype,
    remat: Remat,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step. The state handed in is used up; its layout never changes."""
    step = partial(
        train_step,
        config=config,
        optimizer=optimizer,
        objective=objective,
        states=bind_states(config, mesh, compute_dtype=compute_dtype, remat=remat),
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def bind_states(
    config: ModelConfig, mesh: Mesh, *, compute_dtype: jnp.dtype, remat: Remat
) -> States:
    """What computes the states of a batch, spread over the mesh: the student's kind decides."""
    lines = NamedSharding(mesh, BATCH)

    def constrain(hidden: Array) -> Array:
        return jax.lax.with_sharding_constraint(hidden, lines)

    def gather(shared: Array) -> Array:
        rest = (PartitionSpec.UNCONSTRAINED,) * (shared.ndim - 1)
        layout = NamedSharding(mesh, PartitionSpec(None, *rest))
        return jax.lax.with_sharding_constraint(shared, layout)

    if isinstance(config, EncoderDecoderConfig):
        return partial(plain_states, config, dtype=compute_dtype, remat=remat, constrain=constrain)
    run = partial(run_blocks, config, compute_dtype=compute_dtype, remat=remat, constrain=constrain)
    return partial(tree_states, config, run=run, gather=gather)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """A fresh state around `params`, and its shardings: moments lie where their weights lie."""
    shardings = lay_state(params, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jnp.zeros((), jnp.int32, device=shardings.step)
    return TrainState(step, params, opt_state), shardings  # pyright: ignore


def lay_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shardings of a state around `params`, which may be shapes with shardings alone."""
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, param_shardings, opt_shardings)  # pyright: ignore


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """What `init_state` would make, as shapes with shardings; `params` may be such shapes, too."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    moments = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        TrainState(count, params, moments),  # pyright: ignore
        lay_state(params, optimizer, mesh),
    )


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """The batch, the same in every process, on the devices, as `lay_batch` says.

    Each process puts its own part.
    """

    def put(array: ArrayLike, sharding: NamedSharding) -> Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(put, batch, lay_batch(batch, mesh))


def lay_batch(batch: AnyBatch, mesh: Mesh) -> Any:
    """The shardings of a batch: each line on its own, counts everywhere."""
    lines = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    everywhere = NamedSharding(mesh, PartitionSpec())
    layout = jax.tree.map(lambda _: lines, batch)
    return layout._replace(counts=jax.tree.map(lambda _: everywhere, batch.counts))
