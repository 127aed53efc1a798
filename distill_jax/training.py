"""The training of one round: steps, figures, checkpoints; continued where it was interrupted."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from distill_jax import packing, plain_packing
from distill_jax.ballot import Ballot
from distill_jax.batches import Course
from distill_jax.checkpoint import TrainingCheckpoints, remove, save_params
from distill_jax.chips import find_chip
from distill_jax.config import Config
from distill_jax.interrupts import postponed
from distill_jax.mirror import push
from distill_jax.packing import make_grid
from distill_jax.processes import is_main
from distill_jax.progress import Progress
from distill_jax.rows import Rows
from distill_jax.run_folder import ANOTHER_FOLDER, Partial
from distill_jax.sinks import Send, SinkName, open_sinks
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.flops import step_flops
from distill_jax.student.model import ModelConfig, Params, narrow
from distill_jax.student.objective import Objective
from distill_jax.student.step import (
    TrainState,
    abstract_state,
    init_state,
    lay_state,
    make_optimizer,
    make_step,
    num_row_shards,
    put_batch,
    warmup_schedule,
)
from distill_jax.teaching import wanted_alternatives

T = TypeVar("T")
SAVE, STOP = 1, 2
"""What a process may wish between two steps."""

GO_ON = "the same command goes on from here."

WINDOW = 10
"""Steps that rates are taken over."""


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number; says where, and what to lower."""

    exit_code = 1


def train_round(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    rows: Rows,
    load: Callable[[], tuple[Params, Params | None]],
    folder: Path,
    *,
    round_index: int,
    progress: Progress,
    sinks: Sequence[SinkName] = (),
) -> tuple[Params, Params | None]:
    """Trains on the rows of a round, and leaves `checkpoint/` and `metrics.jsonl` in `folder`.

    Optimiser and warmup begin anew each round, as in the original.

    Args:
      config: All settings.
      model: What the student looks like.
      mesh: Where its weights lie.
      rows: What to train on.
      load: Gives the weights that are trained, which are used up, and those that are not.
      folder: The round's folder.
      round_index: From 1.
      progress: Where to show the steps.
      sinks: Where their figures go, besides `metrics.jsonl`.

    Returns:
      The trained weights, and the others.

    Raises:
      TrainingDiverged: a loss is not a number. The states saved before it are kept.
    """
    train = config.train
    schedule = warmup_schedule(by_round(train.learning_rates, round_index), train.warmup_steps)
    optimizer = make_optimizer(schedule, train.weight_decay)
    course = make_course(config, model, mesh, rows, round_index)
    title = f"training, round {round_index}"
    figures = _Figures(folder / "metrics.jsonl", round_index, mesh)
    with closing(figures), postponed() as asked_to_stop:
        with TrainingCheckpoints(folder / "training") as checkpoints:
            state, frozen, reference = _begin(config, load, optimizer, mesh, checkpoints)
            step = make_step(
                model,
                optimizer,
                course.objective,
                mesh=mesh,
                state_shardings=lay_state(state.params, optimizer, mesh),
                compute_dtype=jnp.dtype(config.student.compute_dtype),
                remat=train.remat,
            )
            done = int(state.step)
            moments = _Moments(train.checkpoint_every, mesh, asked_to_stop, done)
            progress.note(f"{title}: {_tell_shapes(course)}")
            figures.begin(done, sinks, progress.note)
            with progress.stage(title, total=len(course), unit="steps", done=done) as advance:
                for index, (epoch, batch) in enumerate(course.batches(done), start=done):
                    wish = moments.look(index, epoch)
                    if wish:
                        figures.flush()
                        push()  # a state is of use only with the figures of all steps before it
                        checkpoints.save(index, state)
                    if wish == STOP:
                        raise KeyboardInterrupt(f"{title}: saved after step {index}; {GO_ON}")
                    state, metrics = step(state, put_batch(batch, mesh), frozen, reference)
                    work = {
                        "computed_tokens": batch.computed,
                        "flops": step_flops(model, batch.counts, course.objective),
                    }
                    facts = {"step": index, "epoch": epoch, **work}
                    measured = {"learning_rate": schedule(index), **metrics}
                    advance(1, figures.add(facts, measured))
                figures.flush()
        save_params(folder / "checkpoint", state.params)
        figures.finish()
        push()  # the states are needed until everybody can know that the round is trained
        remove(folder / "training")
    return state.params, frozen


def make_course(
    config: Config, model: ModelConfig, mesh: Mesh, rows: Rows, round_index: int
) -> Course:
    """All batches of a round."""
    train, shards, objective = config.train, num_row_shards(mesh), make_objective(config)
    microbatches = train.batch_size // train.microbatch_size
    return Course(
        rows,
        objective if rows.num_soft else replace(objective, alternatives=0),
        train.batch_size,
        make_grid(train.batch_size, microbatches=microbatches, shards=shards),
        seed=config.seed,
        round_index=round_index,
        epochs=train.epochs,
        steps=by_round(train.steps, round_index),
        packing=plain_packing if isinstance(model, EncoderDecoderConfig) else packing,
    )


def by_round(values: Sequence[T], round_index: int) -> T:
    """What a list has for a round, from 1; the last value repeats.

    Example:
      >>> by_round((1e-6, 7e-7), 3)
      7e-07
    """
    return values[min(round_index, len(values)) - 1]


def _begin(
    config: Config,
    load: Callable[[], tuple[Params, Params | None]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: TrainingCheckpoints,
) -> tuple[TrainState, Params | None, Params | None]:
    """The state that was saved, or a fresh one; what is not trained; and DPO's reference.

    The weights that the round began with are let go before a saved state is read: memory may not
    hold both.
    """
    trained, frozen = load()
    reference = _copy(trained, config) if config.reflection.objective == "dpo" else None
    if checkpoints.any():
        like = abstract_state(trained, optimizer, mesh)
        del trained
        state = checkpoints.restore(like)
        if state is not None:
            return state, frozen, reference
        del frozen
        trained, frozen = load()  # none of what was saved can be read
    return init_state(trained, optimizer, mesh)[0], frozen, reference


def _copy(params: Params, config: Config) -> Params:
    """The weights that the round begins with, for DPO to compare with."""
    dtype = jnp.dtype(config.student.compute_dtype)
    return jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 0, narrow(x, dtype)))(params)


def _tell_shapes(course: Course) -> str:
    sizes = course.sizes
    programs = f"{len(sizes)} programs are" if len(sizes) > 1 else "1 program is"
    return f"{programs} compiled, for {', '.join(f'{size:,}' for size in sizes)} tokens a step"


def make_objective(config: Config) -> Objective:
    """What the step makes small under `config`."""
    reflection = config.reflection
    return Objective(
        prompt_weight=config.train.prompt_weight,
        reflection=reflection.objective,
        reflection_weight=reflection.weight,
        margin=reflection.margin,
        beta=reflection.beta,
        prefix_gradient=reflection.prefix_gradient,
        alternatives=wanted_alternatives(config),
    )


class _Moments:
    """When the state is saved: at steps, each epoch's end, after minutes, and before a stop.

    Clocks and signals are each process's own; the ballot has all act on them at the same step.
    """

    def __init__(
        self, every: tuple[int, float], mesh: Mesh, asked_to_stop: Callable[[], bool], done: int
    ):
        self._steps, minutes = every
        self._seconds = 60 * minutes
        self._asked_to_stop, self._ballot = asked_to_stop, Ballot(mesh)
        self._first, self._epoch, self._saved = done, -1, time.monotonic()

    def look(self, index: int, epoch: int) -> int:
        """What all processes do before step `index`: 0, SAVE or STOP, which saves too."""
        late = time.monotonic() - self._saved > self._seconds
        wish = self._ballot.cast(STOP if self._asked_to_stop() else SAVE if late else 0)
        if index % self._steps == 0 or epoch != self._epoch:
            wish = max(wish, SAVE)
        self._epoch = epoch
        if index == self._first:
            return 0  # it has been saved, or nothing has been done
        if wish:
            self._saved = time.monotonic()
        return wish


class _Figures:
    """The lines of `metrics.jsonl`, each read from the device one step late.

    The next step is on its way before the figures of the last are asked for, so the device never
    waits for the disk; and no more than two steps are ever queued.
    """

    def __init__(self, path: Path, round_index: int, mesh: Mesh):
        self._path, self._round = path, round_index
        chip = find_chip(mesh.devices.flat[0].device_kind)
        self._peak = mesh.size * chip.flops if chip else 0.0
        self._rows = Partial(path)
        self._sinks = ExitStack()
        self._send: Send = lambda row: None
        self._waiting: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._last = time.monotonic()
        self._window: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)

    def add(self, facts: dict[str, Any], metrics: dict[str, Any]) -> str:
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
        row = {"round": self._round, **facts, "peak_flops": self._peak, **values}
        row["seconds"] = round(now - self._last, 4)
        self._last = now
        self._window.append((values["useful_tokens"], row["flops"], row["seconds"]))
        tokens, flops, seconds = map(sum, zip(*self._window, strict=True))
        row["tokens_per_second"] = round(tokens / seconds, 1)
        if row["peak_flops"]:
            row["flops_utilisation"] = round(flops / seconds / row["peak_flops"], 4)
        if not all(math.isfinite(value) for value in values.values()):
            raise TrainingDiverged(
                f"round {self._round}, step {row['step']}: the loss is {values['loss']} and the "
                f"gradient's norm {values['gradient_norm']}; lower train.learning_rates, or set "
                f"student.compute_dtype=float32, and {ANOTHER_FOLDER}."
            )
        self._rows.append([row])
        self._rows.sync()  # a state that is saved next is of use only with them
        self._send(row)
        return f"loss {values['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"

    def begin(self, done: int, sinks: Sequence[SinkName], note: Callable[[str], None]) -> None:
        """Forgets the steps after the first `done`; those to come go to `sinks`, too."""
        self._rows.keep(done)
        opened = open_sinks(sinks if is_main() else (), self._path.parent, done=done, note=note)
        self._send = self._sinks.enter_context(opened)

    def close(self) -> None:
        """Releases the file and the sinks; the lines stay."""
        self._rows.close()
        self._sinks.close()

    def finish(self) -> None:
        """Makes the lines the round's finished `metrics.jsonl`."""
        self._rows.finish(self._path)
