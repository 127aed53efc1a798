"""The training of one round: steps, figures, checkpoints; continued where it was interrupted."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from distill_jax.batches import Rows, make_batches, num_steps
from distill_jax.checkpoint import TrainingCheckpoints, abstract, save_params
from distill_jax.config import Config
from distill_jax.progress import Progress
from distill_jax.run_folder import Partial
from distill_jax.student.model import ModelConfig, Params
from distill_jax.student.step import (
    TrainState,
    init_state,
    make_optimizer,
    make_step,
    num_row_shards,
    put_batch,
    warmup_schedule,
)
from distill_jax.student.tree import Batch, Objective, computed_tokens


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number; says where, and what to lower."""

    exit_code = 1


def train_round(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    rows: Rows,
    load: Callable[[], Params],
    folder: Path,
    *,
    round_index: int,
    progress: Progress,
) -> Params:
    """Trains on the rows of a round, and leaves `checkpoint/` and `metrics.jsonl` in `folder`.

    Optimiser and warmup begin anew each round, as in the original.

    Args:
      config: All settings.
      model: What the student looks like.
      mesh: Where its weights lie.
      rows: What to train on.
      load: Gives the weights that the round begins with; they are used up.
      folder: The round's folder.
      round_index: From 1.
      progress: Where to show the steps.

    Returns:
      The trained weights.

    Raises:
      TrainingDiverged: a loss is not a number. The states saved before it are kept.
    """
    train = config.train
    schedule = warmup_schedule(
        train.learning_rates[min(round_index, len(train.learning_rates)) - 1], train.warmup_steps
    )
    optimizer = make_optimizer(schedule, train.weight_decay)
    state, layout = init_state(load(), optimizer, mesh)
    step = _compile(config, model, mesh, optimizer, layout)
    total = round_steps(config, rows, round_index)
    with TrainingCheckpoints(folder / "training") as checkpoints:
        state = checkpoints.restore(abstract(state)) or state
        done = int(state.step)
        figures = _Figures(folder / "metrics.jsonl", round_index, done)
        batches = make_batches(
            rows,
            batch_size=train.batch_size,
            multiple=num_row_shards(mesh) * num_microbatches(config),
            pairs=config.reflection.objective != "none",
            seed=config.seed,
            round_index=round_index,
            epochs=train.epochs,
            start=done,
        )
        title = f"training, round {round_index}"
        with progress.stage(title, total=total, unit="steps", done=done) as advance:
            for index, (epoch, batch) in enumerate(batches, start=done):
                state, metrics = step(state, put_batch(batch, mesh))
                facts = {
                    "step": index,
                    "epoch": epoch,
                    "learning_rate": float(jnp.asarray(schedule(index))),
                    "computed_tokens": computed_tokens(batch),
                }
                advance(1, figures.add(facts, metrics))
                if (index + 1) % train.checkpoint_every == 0 and index + 1 < total:
                    checkpoints.save(index + 1, state)
            figures.flush()
    save_params(folder / "checkpoint", state.params)
    figures.finish()
    shutil.rmtree(folder / "training")
    return state.params


def _compile(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    layout: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    return make_step(
        model,
        optimizer,
        make_objective(config),
        mesh=mesh,
        state_shardings=layout,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        microbatches=num_microbatches(config),
        remat=config.train.remat,
    )


def num_microbatches(config: Config) -> int:
    """Into how many parts a batch is cut, computed one after the other."""
    return config.train.batch_size // config.train.microbatch_size


def round_steps(config: Config, rows: Rows, round_index: int) -> int:
    """How many updates a round has."""
    return num_steps(
        rows,
        batch_size=config.train.batch_size,
        seed=config.seed,
        round_index=round_index,
        epochs=config.train.epochs,
    )


def make_objective(config: Config) -> Objective:
    """What the step makes small under `config`."""
    reflection = config.reflection
    return Objective(
        prompt_weight=config.train.prompt_weight,
        reflection=reflection.objective,
        reflection_weight=reflection.weight,
        margin=reflection.margin,
        prefix_gradient=reflection.prefix_gradient,
    )


class _Figures:
    """The lines of `metrics.jsonl`, each read from the device one step late.

    The next step is on its way before the figures of the last are asked for, so the device never
    waits for the disk; and no more than two steps are ever queued.
    """

    def __init__(self, path: Path, round_index: int, done: int):
        self._path, self._round = path, round_index
        self._rows = Partial(path)
        self._rows.keep(done)
        self._waiting: tuple[dict[str, Any], dict[str, jax.Array]] | None = None
        self._last = time.monotonic()

    def add(self, facts: dict[str, Any], metrics: dict[str, jax.Array]) -> str:
        """Takes the figures of one step; returns a few words on the step before it."""
        words = self.flush()
        self._waiting = (facts, metrics)
        return words

    def flush(self) -> str:
        """Writes the step that is still on the device, if there is one."""
        if self._waiting is None:
            return ""
        facts, metrics = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        row = {"round": self._round, **facts, **values, "seconds": round(now - self._last, 4)}
        self._last = now
        if not all(math.isfinite(value) for value in values.values()):
            raise TrainingDiverged(
                f"round {self._round}, step {row['step']}: the loss is {values['loss']} and the "
                f"gradient's norm {values['gradient_norm']}; lower train.learning_rates, or set "
                "student.compute_dtype=float32, and run again."
            )
        self._rows.append([row])
        return f"loss {values['loss']:.4f}"

    def finish(self) -> None:
        """Makes the lines the round's finished `metrics.jsonl`."""
        self._rows.finish(self._path)
