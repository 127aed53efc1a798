"""Whether a run fits hardware that need not be here, how fast it could be, and what would fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jax.chips import CHIPS, Chip
from distill_jax.config import Config, ConfigError, MeshConfig
from distill_jax.layouts import Layout, choose_layout
from distill_jax.plan import topology
from distill_jax.plan.memory import ExamMemory, Memory, count_exam_memory, count_memory
from distill_jax.plan.topology import DoesNotFit, Program, Topology
from distill_jax.plan.work import Round, Texts, count_round, read_student, read_texts
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.student.flops import step_flops
from distill_jax.student.model import ModelConfig
from distill_jax.training import make_objective

GB = 1e9


@dataclass(frozen=True)
class Student:
    """What is taught, and what the first round has it do."""

    model: ModelConfig
    texts: Texts
    round: Round


@dataclass(frozen=True)
class Fit:
    """A run on named hardware, from shapes alone.

    Attributes:
      name: Kind and number of devices.
      layout: The grid.
      memory, exam: Of each device.
      available: Bytes of each device.
      step_seconds, training_seconds, exam_seconds: At best: arithmetic at the rate of the data
        sheet, and for answers the reading of weights.
      nearest: What would fit, where this does not; an empty string where nothing was found.
    """

    name: str
    layout: Layout
    memory: Memory
    exam: ExamMemory | None
    available: float
    step_seconds: float
    training_seconds: float
    exam_seconds: float
    nearest: str

    @property
    def fits(self) -> bool:
        """Whether a step has room."""
        return self.memory.total <= self.available


def plan_student(config: Config) -> Student:
    """Counts the first round of a student; reads its config and tokenizer, never its weights.

    Raises:
      ValueError: the student or the questions are not here.
    """
    questions = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    model, tokenizer = read_student(config, questions)
    texts = read_texts(config, questions, tokenizer)
    return Student(model, texts, count_round(config, model, texts))


def find_hardware(name: str) -> tuple[Chip, int]:
    """A chip and a number from a name such as `h100:8`.

    Raises:
      ConfigError: there is no such chip, or none of them.
    """
    kind, _, number = name.lower().partition(":")
    if kind not in CHIPS or not (number or "1").isdigit() or number == "0":
        raise ConfigError(
            f"--hardware is one of {', '.join(CHIPS)}, and how many, such as h100:8; got {name!r}."
        )
    return CHIPS[kind], int(number or 1)


def fit(config: Config, student: Student, name: str) -> Fit:
    """What a run would take of hardware that need not be here.

    Raises:
      ConfigError: there is no such hardware, or no grid as asked fits it.
    """
    chip, devices = find_hardware(name)
    layout = _layout(config, student.model, chip, devices)
    memory = count_memory(config, student.model, student.texts, layout.axes)
    exam = count_exam_memory(config, student.model, student.texts, devices=devices, chip=chip)
    work = student.round
    step = work.step_flops / (devices * chip.flops)
    answering = work.exam_flops / (devices * chip.flops)
    if exam is not None:
        calls = work.answer_tokens / (exam.rows * devices / exam.tensor)
        answering = max(answering, calls * exam.weights / chip.bandwidth)
    needs = memory.total / chip.memory
    return Fit(
        name=f"{devices} x {name.lower().partition(':')[0]}",
        layout=layout,
        memory=memory,
        exam=exam,
        available=chip.memory,
        step_seconds=step,
        training_seconds=step * work.steps,
        exam_seconds=answering,
        nearest=nearest(config, student, chip, [devices]) if needs > 1 else "",
    )


def _layout(config: Config, model: ModelConfig, chip: Chip, devices: int) -> Layout:
    rows = config.train.microbatch_size
    return choose_layout(config.mesh, model, rows=rows, devices=devices, memory=chip.memory)


def nearest(
    config: Config, student: Student, chip: Chip, sizes: Sequence[int], more: float = 1.0
) -> str:
    """The smallest change by which a step would fit, as counted from shapes.

    Args:
      config: What does not fit.
      student: Its student.
      chip: The kind of device.
      sizes: Numbers of devices that may be had; those up to 64 times the first are tried too if
        there is no other.
      more: How much more the compiler found necessary than was counted.
    """
    sizes = sizes if len(sizes) > 1 else [sizes[0] * 2**power for power in range(7)]
    for devices in sizes:
        for changes in _changes(config):
            train = config.train.model_copy(update=changes)
            changed = config.model_copy(update={"mesh": MeshConfig(), "train": train})
            layout = _layout(changed, student.model, chip, devices)
            memory = count_memory(changed, student.model, student.texts, layout.axes)
            if memory.total * more <= chip.memory:
                words = [f"train.{key}={value}" for key, value in changes.items()]
                words += ["axes chosen"] if config.mesh != MeshConfig() else []
                words += [f"{devices} devices"] if devices != sizes[0] else []
                return " ".join(words)
    return ""


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """Ways to take less memory, those that cost least first."""
    yield {}
    smaller = []
    rows = config.train.microbatch_size
    while rows % 2 == 0:
        rows //= 2
        smaller.append({"microbatch_size": rows})
    yield from smaller
    if config.train.remat != "full":
        yield {"remat": "full"}
        yield from ({**change, "remat": "full"} for change in smaller)


@dataclass(frozen=True)
class Compiled:
    """A run's programs as the compiler made them for a topology.

    Attributes:
      name: Of the topology.
      layout: The grid of training.
      step: The training step.
      useful_tokens: Of that step, without padding.
      useful_flops: Of that step on all devices, without padding or recomputing.
      devices: Of the topology.
      peak: Operations per second of one.
      answers: Choosing one token for `rows` answers; None for encoder-decoders.
      rows: Over all devices.
      available: Bytes of each device.
    """

    name: str
    layout: Layout
    step: Program
    useful_tokens: int
    useful_flops: float
    devices: int
    peak: float
    answers: Program | None
    rows: int
    available: float

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of a device in training: if nothing overlaps, and if all does."""
        each = self.useful_tokens / self.devices
        return each / self.step.in_turn, each / self.step.roofline

    @property
    def utilisation(self) -> tuple[float, float]:
        """The share of the peak that useful operations are; the same two."""
        each = self.useful_flops / self.devices / self.peak
        return each / self.step.in_turn, each / self.step.roofline

    @property
    def answer_tokens_per_second(self) -> tuple[float, float] | None:
        """Of a device in an exam; the same two."""
        if self.answers is None:
            return None
        each = self.rows / self.devices
        return each / self.answers.in_turn, each / self.answers.roofline


def compile_programs(config: Config, student: Student, name: str, *, answers: bool) -> Compiled:
    """Compiles the step, and the program of exams, for TPUs that need not be here.

    Raises:
      ConfigError: there is no such topology, or libtpu is not installed, or is not the one that
        belongs to this JAX.
      DoesNotFit: a program has no room; the message says what has.
    """
    found = topology.find_topology(name)
    model, texts = student.model, student.texts
    try:
        step, layout, batch = topology.compile_step(config, model, texts, found)
        decoder = answers and count_exam_memory(
            config, model, texts, devices=len(found.devices), chip=found.chip
        )
        program, rows = (
            topology.compile_answers(config, model, texts, found) if decoder else (None, 0)
        )
    except DoesNotFit as error:
        raise ConfigError(f"{name}: {error} {_advice(config, student, found, error)}") from None
    return Compiled(
        name=found.name,
        layout=layout,
        step=step,
        useful_tokens=int(batch.counts.useful),
        useful_flops=step_flops(model, batch.counts, make_objective(config)),
        devices=len(found.devices),
        peak=found.chip.flops,
        answers=program,
        rows=rows,
        available=found.chip.memory,
    )


def _advice(config: Config, student: Student, found: Topology, error: DoesNotFit) -> str:
    devices = len(found.devices)
    layout = _layout(config, student.model, found.chip, devices)
    counted = count_memory(config, student.model, student.texts, layout.axes).total
    sizes = [devices, *(topology.count_chips(x) for x in topology.larger(found.name))]
    more = max(error.needed / counted, 1.0)
    near = nearest(config, student, found.chip, sizes, more)
    return f"The nearest that fits, by our count: {near}." if near else "No larger slice fits it."
