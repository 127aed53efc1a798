"""Every knob, on one page: strict frozen models. Unknown keys are errors.

Defaults are those of Wang et al. (EMNLP 2023), but for two that say so.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from distill_jax.records import Form

TASKS = ("gsm8k", "multiarith", "svamp", "csqa", "strategyqa", "arithmetic")
SCRATCH = "scratch"
TUTOR = "tutor"
SELF = "self"
TEACHER = "teacher"
SOME = Field(min_length=1)

Matrix = Literal["query", "key", "value", "out", "up", "gate", "down"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Rates = Annotated[tuple[NotNegative, ...], SOME]
Count = Annotated[int, Field(ge=1)]
CountOrAll = Annotated[int, Field(ge=0)]


class ConfigError(ValueError):
    """A config that can't be run. The message names the key, the value and what is allowed."""


class Section(BaseModel):
    """A group of knobs: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskConfig(Section):
    """Which questions."""

    name: str  # a published set, `arithmetic`, or the path of a JSONL file
    split: Literal["ho2023", "chilled"] = "ho2023"  # of multiarith, svamp and strategyqa
    demonstrations: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
    # who is shown the task's worked examples in front of every question
    dev_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # of train; 0 reproduces the paper
    num_train: CountOrAll = 0  # train questions used, before dev is carved out; 0 is all
    num_test: CountOrAll = 0  # test questions used; 0 is all
    arithmetic: tuple[Annotated[tuple[Count, ...], SOME], Annotated[int, Field(ge=2)]] = (
        (2, 3, 4),  # of arithmetic: lengths of solutions, in sums
        30,  # and the largest number in a question
    )


class LoraConfig(Section):
    """Low-rank adapters."""

    rank: Count
    alpha: Positive = 16.0  # they count by alpha / rank
    targets: Annotated[tuple[Matrix, ...], SOME] = ("query", "value")  # of each block


class StudentConfig(Section):
    """The small model that is taught."""

    model: str  # a Hugging Face directory or hub id; `scratch`: made by `scratch` below;
    # `teacher`: the teacher itself, for exams alone
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # master weights stay float32
    lora: LoraConfig | None = None  # low-rank adapters, which alone are trained, as {rank: 8}


class ExamConfig(Section):
    """How the student answers."""

    samples: CountOrAll = 4  # drawn at random per training question, besides the greedy answer
    temperature: Positive = 1.0
    top_k: CountOrAll = 50  # 0 keeps the whole vocabulary
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: tuple[Count, Count] = (256, 128)  # of the greedy answer, of a sample
    slots: CountOrAll = 0  # answers written at the same time, over all devices; 0: what fits


class TeacherConfig(Section):
    """The large model that answers over HTTP."""

    url: str = (
        TUTOR  # any OpenAI-compatible endpoint; `tutor`: the built-in one; `self`: the student
    )
    model: str = TUTOR
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    samples: Count = 4
    temperature: NotNegative = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    max_tokens: Count = 128
    feedback: bool = True  # from round 2 on, show the student's wrong rationale
    hint: bool = True  # show the gold answer
    extra_tries: CountOrAll = 0  # asks again about questions of which no rationale was kept; ours
    mode: Literal["chat", "batch"] = "chat"  # batch: the provider's Batch API, cheaper and slower
    concurrency: Count = 32  # requests in flight, at most; fewer while the server refuses some
    per_minute: tuple[CountOrAll, CountOrAll] = (0, 0)  # requests, tokens; 0 is no limit
    budget_usd: NotNegative = 0.0  # no request is sent that should pass it; what is free needs none
    price_usd: tuple[NotNegative, NotNegative] | None = None  # prompt, completion; a million tokens


class TutorConfig(Section):
    """How often the built-in teacher errs."""

    wrong_rates: tuple[Probability, Probability] = (0.1, 0.05)  # without and with a mistake shown


class TrainConfig(Section):
    """How the student is trained on a lesson."""

    epochs: Count = 10
    steps: Annotated[tuple[CountOrAll, ...], SOME] = (0,)  # by round, instead; 0: as epochs make
    batch_size: Count = 16
    microbatch_size: Count = 16  # rows computed at a time; smaller saves memory, same gradient
    learning_rates: Rates = (1e-6, 7e-7)  # by round; the last one repeats
    warmup_steps: CountOrAll = 100  # logarithmic, then constant
    weight_decay: NotNegative = 0.01
    prompt_weight: NotNegative = 0.1  # of a prompt token in the language-modelling loss
    rows: Annotated[tuple[Literal["new", "old", "own", "judged", "soft"], ...], SOME] = ("new",)
    # this round's rationales; earlier rounds'; the student's own right samples; judged: of these
    # only those that the teacher approves when it is asked to judge them; soft: along with the
    # teacher's words those that it found likely in their place, where it tells
    targets: Annotated[tuple[Form, ...], SOME] = ("rationale",)  # the first one is the exam's form
    start: Literal["previous", "base"] = "previous"  # the weights that a round begins with
    remat: Literal["none", "dots", "full"] = "dots"  # what the backward pass recomputes
    checkpoint_every: tuple[Count, Positive] = (200, 10.0)  # steps, minutes; and after each epoch


class ReflectionConfig(Section):
    """Learning from one's own mistakes."""

    objective: Literal["triplet", "ranking", "dpo", "none"] = "triplet"
    weight: NotNegative = 0.1  # the paper's 0.5 costs points in docs/results.md
    margin: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0  # triplet: cosine; ranking: nats a token
    beta: Positive = 0.1  # dpo: how much a log ratio counts
    prefix_gradient: bool = False  # let the triplet loss's gradient into the prompt's states


class RoundsConfig(Section):
    """When to stop, and which round is the result."""

    max: CountOrAll = 4  # 0: the untrained student sits the exams, and that is all
    patience: Count = 1  # rounds without a new best dev accuracy before stopping
    select: Literal["best", "last"] = "best"  # the round that sits the test


class MeshConfig(Section):
    """The device grid. An axis of -1 is chosen for the student and the devices."""

    data: int = -1  # copies of the weights; slices are told apart along this axis
    fsdp: int = -1  # devices that one copy is spread over
    tensor: int = -1  # devices that share each product


class Config(Section):
    """Everything that a run depends on."""

    folder: str  # the run folder, made if absent
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    task: TaskConfig
    student: StudentConfig
    scratch: tuple[Count, Count, Count] = (160, 3, 800)  # width, layers, steps of a tiny student
    # that is trained from nothing on generated arithmetic text; our own
    exam: ExamConfig = ExamConfig()
    teacher: TeacherConfig = TeacherConfig()
    tutor: TutorConfig = TutorConfig()
    train: TrainConfig = TrainConfig()
    reflection: ReflectionConfig = ReflectionConfig()
    rounds: RoundsConfig = RoundsConfig()
    mesh: MeshConfig = MeshConfig()

    @pydantic.field_validator("teacher", mode="before")
    @classmethod
    def _expand_tutor(cls, value: Any) -> Any:
        return {} if value == TUTOR else value

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        for problem in _impossible(self):
            raise ValueError(problem)
        return self


def _impossible(config: Config) -> Iterator[str]:
    """Yields a sentence for every combination that can't work."""
    task, train, teacher, axes = config.task, config.train, config.teacher, config.mesh
    if task.name not in TASKS and not task.name.endswith(".jsonl"):
        near = difflib.get_close_matches(task.name, TASKS, n=1)
        known, hint = ", ".join(TASKS), f"; did you mean {near[0]}?" if near else "."
        yield f"task.name is one of {known} or a file that ends in .jsonl; got {task.name!r}{hint}"
    small, size = train.microbatch_size, train.batch_size
    if size % small:
        yield f"train.microbatch_size must divide train.batch_size ({size}); got {small}."
    if task.name == "arithmetic" and not task.num_train:
        yield "task.num_train says how many arithmetic questions to make, at least 1; got 0."
    yield from _impossible_rows(config)
    if config.student.model == SCRATCH and task.name != "arithmetic":
        yield (
            f"student.model={SCRATCH} makes a student that reads arithmetic only, and task.name is "
            f"{task.name}; name a Hugging Face directory or hub id."
        )
    if config.reflection.objective != "none" and not config.exam.samples:
        yield "reflection.objective needs mistakes to reflect on: set exam.samples to 1 or more."
    if any(size == 0 or size < -1 for size in (axes.data, axes.fsdp, axes.tensor)):
        yield f"mesh axes are at least 1, or -1 to have them chosen; got {axes}."
    if not is_free(teacher.url) and teacher.price_usd is None:
        yield (
            f"teacher.price_usd is needed to keep teacher.budget_usd at {teacher.url}: "
            "US dollars per million prompt and completion tokens, such as [0.15, 0.6], "
            "or [0, 0] for an endpoint that costs nothing."
        )
    if any(teacher.price_usd or ()) and not teacher.budget_usd:
        yield "teacher.budget_usd is the most this run may spend, above 0; got 0."


def _impossible_rows(config: Config) -> Iterator[str]:
    """The same, for what is trained on and who teaches it."""
    train, teacher, samples = config.train, config.teacher, config.exam.samples
    if config.student.model == TEACHER and (config.rounds.max or teacher.url == SELF):
        yield f"student.model={TEACHER} sits exams alone: set rounds.max=0 and a teacher.url."
    if "own" in train.rows and not samples:
        yield "train.rows=own takes the student's right samples: set exam.samples to 1 or more."
    if teacher.url == SELF and teacher.samples > 1 + samples:
        yield (
            f"teacher.url={SELF} takes the exam's greedy answer and its samples, "
            f"{1 + samples} in all; got teacher.samples={teacher.samples}."
        )
    if "judged" in train.rows and teacher.url == SELF:
        yield f"train.rows=judged needs a teacher other than the student; got teacher.url={SELF}."
    if "soft" in train.rows and (teacher.url == SELF or not any(map(_is_rationale, train.targets))):
        yield (
            "train.rows=soft learns how likely a teacher finds the words of its rationales: it "
            "needs a teacher other than the student, and rationale among train.targets."
        )
    if not {"new", "old", "own"} & set(train.rows):
        yield f"train.rows names none: put new, old or own beside {', '.join(train.rows)}."
    if not train.targets[0].startswith("rationale") and (
        teacher.url == SELF or "own" in train.rows or any(map(_is_rationale, train.targets))
    ):
        yield (
            "train.targets begins with the form of the exam, and rationales are learnt from those "
            f"of an exam that asks for them: put rationale first; got {list(train.targets)}."
        )


def _is_rationale(form: Form) -> bool:
    return form.startswith("rationale")


def is_free(url: str) -> bool:
    """Whether a teacher at `url` costs nothing: tutor, student, or a server on this machine."""
    if url in (TUTOR, SELF):
        return True
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_config(values: Mapping[str, Any]) -> Config:
    """The config that nested `values` describe.

    Raises:
      ConfigError: a key is unknown, or a value is not allowed.

    Example:
      >>> parse_config({"folder": "runs/a", "task": {"nam": "gsm8k"}, "student": {"model": "m"}})
      Traceback (most recent call last):
      distill_jax.config.ConfigError: task.nam is not a knob; did you mean task.name?
    """
    unknown = next(_unknown_keys(values, Config, ()), None)
    if unknown:
        raise ConfigError(unknown)
    try:
        return Config.model_validate(_meant(values))
    except pydantic.ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def knobs(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all knobs, in order.

    Example:
      >>> next(knobs())
      'folder'
    """
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from knobs(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _unknown_keys(values: Any, section: type[Section], path: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        name = ".".join((*path, str(key)))
        field = section.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(name, list(knobs()) + list(Config.model_fields), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(knobs())}."
            yield f"{name} is not a knob; {hint}"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _unknown_keys(value, field.annotation, (*path, key))


def _meant(value: Any) -> Any:
    """YAML says list where the frozen models say tuple, and reads 1e-5 as a string."""
    if isinstance(value, Mapping):
        return {key: _meant(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_meant(inner) for inner in value)
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def _sentence(error: pydantic.ValidationError) -> str:
    """The first problem in one sentence: key, what is allowed, what was given."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if first["type"] == "missing":
        return f"{key} is missing; it has no default."
    return f"{key}: {message[0].lower()}{message[1:]}; got {first['input']!r}."
