"""The real programs of a run, compiled ahead of time for TPUs that are not here.

Nothing is computed and no weights are read: shapes and shardings go into the compiler, and its own
account of memory, products and exchanges between devices comes out. Needs libtpu, the extra `tpu`.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from distill_jax.chips import CHIPS, Chip
from distill_jax.config import Config, ConfigError
from distill_jax.engine import Engine, exam_mesh
from distill_jax.generate import plan_slots
from distill_jax.layouts import Layout, num_weights, open_mesh
from distill_jax.plan.memory import ROOM, make_prompts
from distill_jax.plan.program import Collective, Work, read_work
from distill_jax.plan.work import LONGEST, Texts, make_batch
from distill_jax.slots import Seating
from distill_jax.student import lora
from distill_jax.student.model import ModelConfig, abstract_params, logical_axes, narrow
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import AXES, TRAIN_RULES, count_slices, shardings
from distill_jax.student.step import (
    TrainState,
    abstract_state,
    lay_batch,
    lay_state,
    make_optimizer,
    make_step,
    num_row_shards,
    warmup_schedule,
)
from distill_jax.training import make_objective

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES}
"""Slices that are sold, small ones first."""


_USED = r"([\d.]+)([KMGT])\)?(?: of | exceeds available HBM \()([\d.]+)([KMGT])"
"""How the compiler says what a program needs and what there is."""


class DoesNotFit(RuntimeError):
    """The compiler found no room for a program; says how much it needs of how much."""

    exit_code = 2

    def __init__(self, program: str, needed: float, available: float):
        super().__init__(
            f"{program} needs {needed / 1e9:,.1f} GB on each device and has {available / 1e9:,.1f}."
        )
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Topology:
    """Devices that are not here.

    Attributes:
      name: As given: kind and shape of a slice, and their number if there are several.
      chip: What one can do.
      devices: For the compiler.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


@dataclass(frozen=True)
class Exchange:
    """What a device sends in one call of a program, of one kind.

    Attributes:
      kind: Of the collectives.
      axes: Of the mesh, along which the devices lie that exchange.
      crosses: Whether over the network between slices.
      bytes: In all.
      seconds: At the rates of the data sheet.
    """

    kind: str
    axes: str
    crosses: bool
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      held: Bytes of a device for what goes in and comes out.
      temporary: Bytes for what lives in between.
      work: What each device does.
      exchanges: Of `work`, what is sent.
      seconds: By what takes them: `products`, `memory`, `links` between devices of a slice, and the
        `network` between slices, each at the rates of the data sheet.
    """

    held: float
    temporary: float
    work: Work
    exchanges: tuple[Exchange, ...]
    seconds: dict[str, float]

    @property
    def roofline(self) -> float:
        """Seconds of a call if everything that can overlap does."""
        return max(self.seconds.values())

    @property
    def in_turn(self) -> float:
        """Seconds of a call if nothing overlaps."""
        return sum(self.seconds.values())


def find_topology(name: str) -> Topology:
    """The devices of a name such as `v5e:4x4`, or `v5e:16x16*4` for four slices.

    Raises:
      ConfigError: there is no such kind or shape, or libtpu is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name.lower())
    kind = found[1] if found else ""
    if found is None or kind not in SHAPES:
        raise ConfigError(
            f"--topology is {', '.join(SHAPES)} and a shape, such as v5e:4x4, or v5e:16x16*4 for "
            f"four slices; got {name!r}."
        )
    if found[2] not in SHAPES[kind]:
        size = math.prod(map(int, found[2].split("x")))
        near = min(SHAPES[kind], key=lambda shape: abs(math.log(count_chips(shape) / max(size, 1))))
        raise ConfigError(
            f"--topology {name}: {kind} slices are {', '.join(SHAPES[kind])}; the nearest is "
            f"{kind}:{near}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology compiles for TPUs and needs libtpu: pip install 'distill_jax[tpu]'."
        )
    # There is no TPU here: nobody to ask about it, and nothing that two processes could fight for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": int(found[3])} if found[3] not in (None, "1") else {}
    if count_chips(found[2]) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{found[2]}", **options
    )
    return Topology(name.lower(), CHIPS[kind], tuple(described.devices))


def count_chips(shape: str) -> int:
    """The chips of a slice, such as `4x4` or `v5e:4x4`."""
    return math.prod(map(int, shape.rpartition(":")[2].partition("*")[0].split("x")))


def larger(name: str) -> Iterator[str]:
    """The names of larger slices of the same kind, small ones first."""
    kind, _, shape = name.partition(":")
    shape = shape.partition("*")[0]
    yield from (f"{kind}:{x}" for x in SHAPES[kind] if count_chips(x) > count_chips(shape))


def compile_step(
    config: Config, model: ModelConfig, texts: Texts, topology: Topology
) -> tuple[Program, Layout, Any]:
    """The training step of a batch with the longest rationales.

    Returns:
      The program, the grid it is for, and the batch.

    Raises:
      DoesNotFit: the devices have too little memory for it.
      ConfigError: no grid fits the devices, or the prompts leave no room for a rationale.
    """
    mesh, layout = open_mesh(config, model, topology.devices)
    batch = make_batch(config, model, texts, shards=num_row_shards(mesh), share=LONGEST)
    state, frozen, shards = _abstract_state(config, model, mesh)
    dtype = jnp.dtype(config.student.compute_dtype)
    reference = None
    if config.reflection.objective == "dpo":
        fewer = jax.eval_shape(partial(narrow, dtype=dtype), state.params)
        reference = jax.tree.map(lambda x, y: x.update(dtype=y.dtype), state.params, fewer)
    step = make_step(
        model,
        _optimizer(config),
        make_objective(config),
        mesh=mesh,
        state_shardings=shards,
        compute_dtype=dtype,
        remat=config.train.remat,
    )
    given = jax.tree.map(_shape, batch, lay_batch(batch, mesh))
    lowered = step.lower(state, given, frozen, reference)
    return _compile("the training step", lowered, topology, mesh), layout, batch


def _optimizer(config: Config) -> Any:
    train = config.train
    return make_optimizer(
        warmup_schedule(train.learning_rates[0], train.warmup_steps), train.weight_decay
    )


def _abstract_state(
    config: Config, model: ModelConfig, mesh: Mesh
) -> tuple[TrainState, Any, TrainState]:
    """A state and what is not trained, as shapes; and the shardings of the state."""
    shapes = abstract_params(model)
    layout = shardings(mesh, logical_axes(model), shapes, TRAIN_RULES)
    params = jax.tree.map(_shape, shapes, layout)
    params, frozen = lora.split(params) if model.lora else (params, None)
    optimizer = _optimizer(config)
    state = abstract_state(params, optimizer, mesh)
    return state, frozen, lay_state(params, optimizer, mesh)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def compile_answers(
    config: Config, model: ModelConfig, texts: Texts, topology: Topology
) -> tuple[Program, int]:
    """The program in which rows of the exam on training questions choose tokens.

    Its loop over tokens counts once: figures are those of one token for every row.

    Returns:
      The program, and rows over all devices.

    Raises:
      DoesNotFit: the devices have too little memory for it.
    """
    exam, dtype = config.exam, jnp.dtype(config.student.compute_dtype)
    model = replace(model, lora=None)
    mesh, _ = open_mesh(config, model, topology.devices)
    num_bytes = num_weights(abstract_params(model)) * dtype.itemsize
    engine = Engine(
        model,
        exam_mesh(mesh, num_bytes, int(topology.chip.memory)),
        end_id=0,
        newlines=np.zeros(model.vocab_size, np.uint8),
        sampling=Sampling(exam.temperature, exam.top_k, exam.top_p),
        compute_dtype=dtype,
    )
    share = 1 + exam.samples
    prompts = make_prompts(config, texts)
    free = topology.chip.memory - num_bytes / engine.mesh.shape["tensor"]
    slots = plan_slots(
        engine, prompts, asked=exam.slots, num_owed=texts.train * share, free=int(ROOM * free)
    )
    owed = range(len(prompts))
    seating = Seating(prompts, owed=owed, desks=engine.desks, slots=slots)
    while seating.read() is not None:
        pass
    _, rows, enough = seating.seat()
    lowered = engine.lower_advance(texts.shared, seating.sizes, rows, enough, share=share)
    program = _compile("answering an exam", lowered, topology, engine.mesh)
    return program, slots * engine.desks


def _compile(name: str, lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh) -> Program:
    try:
        with _uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(_USED, str(error))
        if used is None:
            raise
        raise DoesNotFit(name, _bytes(used[1], used[2]), _bytes(used[3], used[4])) from None
    sizes, text = compiled.memory_analysis(), _text(compiled)
    assert sizes is not None and text is not None, "TPU compilers say both"
    work = read_work(text)
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    exchanges = _exchanges(work, topology.chip, mesh)
    return Program(
        held=float(sizes.argument_size_in_bytes + new),
        temporary=float(sizes.temp_size_in_bytes),
        work=work,
        exchanges=exchanges,
        seconds=_seconds(work, topology.chip, exchanges),
    )


def _text(compiled: jax.stages.Compiled) -> str | None:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"JAX {jax.__version__} can't read what libtpu {importlib.metadata.version('libtpu')} "
            "compiled; install the libtpu that belongs to it: pip install 'jax[tpu]'."
        ) from error


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's cache, which can't read those of devices that are not here."""
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def _exchanges(work: Work, chip: Chip, mesh: Mesh) -> tuple[Exchange, ...]:
    """What a device sends, put together by kind, axes and network."""
    found: dict[tuple[str, str, bool], Exchange] = {}
    for each in work.collectives:
        devices = [mesh.devices.flat[place] for place in each.group]
        crosses = count_slices(devices) > 1
        places = np.unravel_index(each.group, mesh.devices.shape)
        axes = "+".join(
            name for name, at in zip(AXES, places, strict=True) if len(set(at.tolist())) > 1
        )
        rate = chip.network if crosses else chip.links * _links(each, devices, chip)
        size = each.bytes * each.times
        before = found.get((each.kind, axes, crosses), Exchange(each.kind, axes, crosses, 0.0, 0.0))
        found[each.kind, axes, crosses] = replace(
            before, bytes=before.bytes + size, seconds=before.seconds + size / rate
        )
    return tuple(found.values())


def _seconds(work: Work, chip: Chip, exchanges: Sequence[Exchange]) -> dict[str, float]:
    """How long each part takes by itself."""
    return {
        "products": work.flops / chip.flops,
        "memory": work.bytes / chip.bandwidth,
        "links": sum(each.seconds for each in exchanges if not each.crosses),
        "network": sum(each.seconds for each in exchanges if each.crosses),
    }


def _links(each: Collective, devices: Sequence[Any], chip: Chip) -> float:
    """The share of its links that a device uses: those along the dims in which the group lies."""
    if each.kind == "collective-permute":  # one neighbour gets something, in one dim
        return 1 / chip.torus
    dims = sum(len(set(places)) > 1 for places in zip(*(x.coords for x in devices), strict=True))
    return max(dims, 1) / chip.torus
