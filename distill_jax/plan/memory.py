"""What a run takes of each device's memory, by part, counted from shapes alone."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from distill_jax.chips import Chip
from distill_jax.config import Config
from distill_jax.engine import count_page_shards, exam_tensor
from distill_jax.generate import MOST_SLOTS, row_bytes
from distill_jax.layouts import Axes, num_weights
from distill_jax.plan.work import LONGEST, Texts, make_batch
from distill_jax.slots import LEAST, Prompt, Row
from distill_jax.student import lora
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.losses import chunk_size
from distill_jax.student.model import ModelConfig, abstract_params, logical_axes, run_blocks
from distill_jax.student.objective import losses
from distill_jax.student.plain import plain_states
from distill_jax.student.sharding import AXES, TRAIN_RULES, shardings
from distill_jax.student.tree import tree_states
from distill_jax.training import make_objective

ROOM = 0.9
"""Of the memory that weights leave in an exam, for pages and all else, as a run takes it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while it trains.

    Attributes:
      weights: Master weights, in float32, and what DPO compares them with.
      moments: The optimiser's two per trained weight.
      gradients: Of trained weights.
      activations: What is kept of the forward pass for the backward pass, or recomputed of one
        block, for one microbatch.
      logits: Of the tokens whose logits live at the same time, and their gradient.
    """

    weights: float
    moments: float
    gradients: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.weights + self.moments + self.gradients + self.activations + self.logits


def count_memory(config: Config, model: ModelConfig, texts: Texts, axes: Axes) -> Memory:
    """What the step takes at most, on a grid of these sizes.

    Raises:
      ConfigError: the prompts leave no room for a rationale.
    """
    params = abstract_params(model)
    mesh = AbstractMesh(axes, AXES)
    layout = shardings(mesh, logical_axes(model), params, TRAIN_RULES)
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), params, layout)
    trained = sum(jax.tree.leaves(lora.split(parts)[0] if model.lora else parts))
    data, fsdp, tensor = axes
    batch = make_batch(config, model, texts, shards=data * fsdp, share=LONGEST)
    line = jax.tree.map(lambda x: x[0, :1], batch._replace(counts=None))  # pyright: ignore
    predicting = batch.targets.shape[-1] * math.prod(batch.targets.shape[2:-1])
    chunk = min(chunk_size(model.padded_vocab), predicting)
    compared = jnp.dtype(config.student.compute_dtype).itemsize * trained
    return Memory(
        weights=4.0 * sum(jax.tree.leaves(parts))
        + (compared if config.reflection.objective == "dpo" else 0),
        moments=8.0 * trained,
        gradients=4.0 * trained,
        activations=_kept_bytes(config, _part_of(model, tensor), line),
        logits=2 * 4.0 * chunk * model.padded_vocab / tensor,
    )


@dataclass(frozen=True)
class ExamMemory:
    """Bytes of one device while the student answers.

    Attributes:
      tensor: Devices that share one copy of the weights.
      rows: Answers that a copy writes at the same time.
      weights: In the dtype that they are computed in.
      cache: Keys and values of these answers and their prompts, and their logits.
    """

    tensor: int
    rows: int
    weights: float
    cache: float


def count_exam_memory(
    config: Config, model: ModelConfig, texts: Texts, *, devices: int, chip: Chip
) -> ExamMemory | None:
    """What the exam on training questions takes; None for encoder-decoders, whose caches are small.

    As many answers are written at the same time as are worth while and fit.
    """
    if isinstance(model, EncoderDecoderConfig):
        return None
    dtype, share = jnp.dtype(config.student.compute_dtype), 1 + config.exam.samples
    num_bytes = num_weights(abstract_params(replace(model, lora=None))) * dtype.itemsize
    tensor = exam_tensor(devices, num_bytes, int(chip.memory))
    prompts = make_prompts(config, texts)
    each = row_bytes(model, prompts, dtype=dtype, shards=count_page_shards(model, tensor))
    desks = devices // tensor
    most = -(-config.exam.slots // desks) or MOST_SLOTS
    free = int(ROOM * (chip.memory - num_bytes / tensor))
    rows = max(LEAST, min(most, free // each, -(-texts.train * share // desks)) // LEAST * LEAST)
    return ExamMemory(tensor, rows, num_bytes / tensor, float(rows * each))


def make_prompts(config: Config, texts: Texts) -> list[Prompt]:
    """Prompts of an exam on training questions, without a word in them."""
    prompts = [Prompt(index, [0] * length) for index, length in enumerate(texts.prompts)]
    for prompt in prompts:
        for place in range(1 + config.exam.samples):
            limit = config.exam.max_new_tokens[min(place, 1)]
            prompt.rows.append(Row(prompt, place, limit, np.zeros(2, np.uint32)))
    return prompts


def _part_of(model: ModelConfig, tensor: int) -> ModelConfig:
    """A model with the heads and the inner width that one device of a tensor axis computes."""
    heads, kv_heads = model.heads, model.kv_heads
    if heads % tensor == 0:
        heads //= tensor
        kv_heads = kv_heads // tensor if kv_heads % tensor == 0 else math.gcd(kv_heads, heads)
    width = model.mlp_width // tensor if model.mlp_width % tensor == 0 else model.mlp_width
    return replace(model, heads=heads, kv_heads=kv_heads, mlp_width=width)


def _kept_bytes(config: Config, model: ModelConfig, line: Any) -> float:
    """Bytes of what a backward pass needs of the forward pass over one line, beside the weights."""
    dtype, objective = jnp.dtype(config.student.compute_dtype), make_objective(config)
    if objective.reflection == "dpo":  # keeps the same, as its reference gets no gradient
        objective = replace(objective, reflection="ranking")
    settings: Any = {"remat": config.train.remat, "constrain": lambda x: x}
    if isinstance(model, EncoderDecoderConfig):
        states = partial(plain_states, model, dtype=dtype, **settings)
    else:
        run = partial(run_blocks, model, compute_dtype=dtype, **settings)
        states = partial(tree_states, model, run=run)

    def loss(params: Any, line: Any) -> jax.Array:
        sums = losses(model, params, line, objective, states=states)
        return sums.lm + sums.reflection

    def pull(params: Any, line: Any) -> Any:
        return jax.vjp(lambda params: loss(params, line), params)[1]

    traced = jax.make_jaxpr(pull)(abstract_params(model), line).jaxpr
    given = {*map(id, traced.invars), *map(id, traced.constvars)}
    kept = {id(x): x.aval for x in traced.outvars if id(x) not in given}
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in kept.values()))
