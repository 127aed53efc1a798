"""What the stages of a run share: the questions, the student and its weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax import checkpoint, processes, prompts, run_folder, scratch, weights
from distill_jax.config import SCRATCH, TEACHER, Config, ConfigError
from distill_jax.contamination import ExamTexts, Reason
from distill_jax.exam import Sitting
from distill_jax.generate import Generate, make_generate
from distill_jax.layouts import Layout, open_mesh
from distill_jax.mirror import bring, push
from distill_jax.progress import Progress
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.records import Question, Split, from_json, to_json
from distill_jax.run_folder import round_folder, stream_records, write_records
from distill_jax.sinks import SinkName
from distill_jax.student import lora
from distill_jax.student.architecture import EncoderDecoderConfig, Lora
from distill_jax.student.model import ModelConfig, Params, abstract_params, logical_axes
from distill_jax.student.sharding import TRAIN_RULES, shardings
from distill_jax.teaching import sit_exam
from distill_jax.tokenizer import Tokenizer, load_tokenizer


class Weights:
    """The weights of one round at a time, in memory if they are, else from disk.

    Attributes:
      model: What is trained: the student, with its adapters if it has some.
    """

    def __init__(self, folder: Path, base: Path, model: ModelConfig, mesh: Mesh, *, seed: int):
        self.model = model
        self._folder, self._base, self._seed = folder, base, seed
        shapes = abstract_params(model)
        self._layout = shardings(mesh, logical_axes(model), shapes, TRAIN_RULES)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
            shapes,
            self._layout,
        )
        self._base_layout = lora.split(self._layout)[1]
        self._like = lora.split(like)[0] if model.lora else like
        self._merge = jax.jit(self._trace_merge, donate_argnums=1, out_shardings=self._base_layout)
        self._held: tuple[int, Params] | None = None

    def get(self, round_index: int) -> Params:
        """The weights after a round, adapters merged into them; 0 is the untrained student.

        Raises:
          ValueError: there is no such round, or its weights can't be read.
        """
        if self._held is None or self._held[0] != round_index:
            self._held = None  # let go of the old ones first: both may not fit
            self._held = (round_index, self._load(round_index))
        return self._held[1]

    def take(self, round_index: int) -> tuple[Params, Params | None]:
        """What to go on training, used up by the caller, and what stays as it is.

        All weights and None; or, where the student has adapters, these and the untrained student.
        """
        if self.model.lora:
            self._held = None
            return self.get_adapters(round_index), self._load_base()
        params = self.get(round_index)
        self._held = None
        return params, None

    def put(self, round_index: int, trained: Params, frozen: Params | None) -> None:
        """Keeps what `take` gave, trained and on disk already; uses up what stayed as it was."""
        merged = trained if frozen is None else self._merge(trained, frozen)
        self._held = (round_index, merged)

    def get_adapters(self, round_index: int) -> Params:
        """The adapters after a round; before any they add nothing.

        Raises:
          ValueError: there is no such round, or its adapters can't be read.
        """
        if round_index:
            return self._load_checkpoint(round_index)
        return lora.init_adapters(self.model, jax.random.key(self._seed), self._layout)

    def _load(self, round_index: int) -> Params:
        if round_index == 0:
            return self._load_base()
        saved = self._load_checkpoint(round_index)
        return self._merge(saved, self._load_base()) if self.model.lora else saved

    def _trace_merge(self, trained: Params, frozen: Params) -> Params:
        return lora.merge(self.model, lora.join(trained, frozen))

    def _load_base(self) -> Params:
        return weights.load_params(self._base, self.model.plain, self._base_layout)

    def _load_checkpoint(self, round_index: int) -> Params:
        path = self._folder / f"round_{round_index:02d}" / "checkpoint"
        if not checkpoint.exists(path):
            raise ConfigError(f"{self._folder} has no finished round {round_index}.")
        return checkpoint.load_params(path, self._like)


def open_weights(config: Config, folder: Path, base: Path, mesh: Mesh) -> Weights:
    """The weights of a run's student, with the adapters that its config asks for.

    Raises:
      ConfigError: the student has no such matrices.
    """
    model = add_adapters(config, weights.read_model_config(base))
    return Weights(folder, base, model, mesh, seed=config.seed)


def add_adapters(config: Config, model: ModelConfig) -> ModelConfig:
    """The student with the adapters that its config asks for, if any.

    Raises:
      ConfigError: the student has no such matrices.
    """
    wanted = config.student.lora
    try:
        return replace(model, lora=Lora(**wanted.model_dump())) if wanted else model
    except ValueError as error:
        raise ConfigError(f"student.lora.targets: {error}") from None


@dataclass(frozen=True)
class Student:
    """The small model, ready to sit exams with the weights of any round."""

    base: Path  # the directory that it came from
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    layout: Layout
    weights: Weights
    generate: Generate


def open_student(config: Config, base: Path, folder: Path) -> Student:
    """The student in `base`, whose later rounds lie in the run `folder`; reads no weights yet."""
    model = weights.read_model_config(base)
    mesh, layout = open_mesh(config, add_adapters(config, model))
    tokenizer = load_tokenizer(str(base), ends_prompts=isinstance(model, EncoderDecoderConfig))
    compute_dtype = jnp.dtype(config.student.compute_dtype)
    return Student(
        base=base,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        layout=layout,
        weights=open_weights(config, folder, base, mesh),
        generate=make_generate(
            model, tokenizer, mesh, exam=config.exam, compute_dtype=compute_dtype
        ),
    )


@dataclass(frozen=True)
class School:
    """A run with everything loaded."""

    config: Config
    folder: Path
    questions: dict[Split, list[Question]]
    exam_texts: ExamTexts  # of the test questions, which nobody is taught
    student: Student | None  # None where the teacher sits the exams
    progress: Progress
    sinks: Sequence[SinkName] = ()  # where the figures of training go, too

    def sitting(self, weights_round: int, *, samples: int) -> Sitting:
        """Who sits an exam, with the weights of a round."""
        if self.student is None:
            everything = [question for rows in self.questions.values() for question in rows]
            return sit_exam(self.config, self.folder, everything)
        return partial(
            self.student.generate,
            self.student.weights.get(weights_round),
            samples=samples,
            seed=self.config.seed,
            round_index=weights_round,
        )


def open_school(
    config: Config, folder: Path, progress: Progress, sinks: Sequence[SinkName] = ()
) -> School:
    """Loads questions and student, makes the student if it is `scratch`, and notes what they are.

    Raises:
      ConfigError: there is nothing to teach, or the questions are not those that the run began
        with.
    """
    questions, exam_texts, found = open_questions(config, folder)
    student = None
    if config.student.model != TEACHER:
        student = open_student(config, _base_model(config, folder, questions, progress), folder)
        progress.note(f"mesh {student.layout}")
    if processes.is_main():
        facts = _find_facts(config, folder, questions, found, student)
        run_folder.write_manifest(folder, facts)
    return School(config, folder, questions, exam_texts, student, progress, sinks)


def open_questions(
    config: Config, folder: Path
) -> tuple[dict[Split, list[Question]], ExamTexts, Mapping[Reason, Sequence[str]]]:
    """The questions of a run by split, kept in its folder; and the test's texts.

    Returns:
      Also the ids of training questions that are left out, as they are test questions too.

    Raises:
      ConfigError: as `open_school`.
    """
    rows = processes.tell_each("reading the questions", lambda: _read_questions(config))
    questions = split_questions(from_json(Question, row) for row in rows)
    exam_texts = ExamTexts(questions["test"])
    questions["train"], found = exam_texts.split(questions["train"])
    if not questions["train"]:
        raise ConfigError(
            f"task.name={config.task.name} has no training questions to teach, but for "
            f"{sum(map(len, found.values()))} that are test questions too."
        )
    if processes.is_main():
        _keep_questions(folder, questions)
    return questions, exam_texts, found


def _find_facts(
    config: Config,
    folder: Path,
    questions: Mapping[Split, Sequence[Question]],
    found: Mapping[Reason, Sequence[str]],
    student: Student | None,
) -> dict[str, Any]:
    """What made the run."""
    facts: dict[str, Any] = {
        "contamination": {
            "test_questions": len(questions["test"]),
            **{f"train_questions_{reason}": len(ids) for reason, ids in found.items()},
            "left_out": [id for ids in found.values() for id in ids],
        },
        "prompt_version": prompts.PROMPT_VERSION,
        "questions": {split: len(rows) for split, rows in questions.items()},
        "questions_sha256": run_folder.hash_file(folder / "questions.jsonl"),
        "seed": config.seed,
    }
    if student is not None:
        files = sorted(student.base.glob("*.safetensors"))
        facts |= {
            "weights_sha256": {path.name: run_folder.hash_file(path) for path in files},
            "devices": f"{student.mesh.size} x {jax.devices()[0].device_kind}",
            "mesh": dict(student.mesh.shape),
        }
    return facts


def split_questions(questions: Iterable[Question]) -> dict[Split, list[Question]]:
    splits: dict[Split, list[Question]] = {"train": [], "dev": [], "test": []}
    for question in questions:
        splits[question.split].append(question)
    return splits


def _read_questions(config: Config) -> Iterator[dict[str, Any]]:
    return map(to_json, load_questions(config.task, seed=config.seed, data_dir=default_data_dir()))


def _keep_questions(folder: Path, splits: Mapping[Split, Sequence[Question]]) -> None:
    """Writes the run's questions once; later they must be the same."""
    path, questions = folder / "questions.jsonl", chain.from_iterable(splits.values())
    if not path.exists():
        write_records(path, questions)
    elif any(x != y for x, y in zip_longest(stream_records(path, Question), questions)):
        raise ConfigError(
            f"the questions are not those that {folder} began with; "
            "restore the question set, or name another folder."
        )


def _base_model(
    config: Config, folder: Path, questions: dict[Split, list[Question]], progress: Progress
) -> Path:
    """The directory of the untrained student, made on the way if it is `scratch`."""
    if config.student.model != SCRATCH:
        return weights.find_model(config.student.model)
    path = round_folder(folder, 0) / "student"
    if not processes.tell("looking for the student", path.exists):
        everything = [question for rows in questions.values() for question in rows]
        model, _ = scratch.describe(config, everything)
        mesh, _ = open_mesh(config, model)
        with run_folder.timed(folder, 0, "pretrain"):
            scratch.make_student(config, path, questions=everything, mesh=mesh, progress=progress)
        push()
        processes.gather("writing the student", None)  # the first process has written it
    return bring(path)


def find_base(config: Config, folder: Path) -> Path:
    """The directory of the untrained student of a run that has one.

    Raises:
      ConfigError: the run has not made its student yet, or the student is the teacher.
    """
    if config.student.model == TEACHER:
        raise ConfigError(f"student.model={TEACHER} has no weights; distill-jax run examines it.")
    if config.student.model != SCRATCH:
        return weights.find_model(config.student.model)
    path = folder / "round_00" / "student"
    if not path.exists():
        raise ConfigError(f"{folder} has not made its student yet; run its config first.")
    return bring(path)
