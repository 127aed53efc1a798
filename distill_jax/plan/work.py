"""What the first round has a student do: texts, batches, steps, answers, and their operations.

Nobody knows yet how long rationales will be. All are taken to have half of the tokens that they may
where time is told, and all of them where memory is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_jax import packing, plain_packing, scratch, weights
from distill_jax.config import SCRATCH, TEACHER, Config, ConfigError
from distill_jax.int_lists import Prompts
from distill_jax.packing import Item, make_grid
from distill_jax.records import Question
from distill_jax.school import add_adapters
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.flops import forward_flops, step_flops
from distill_jax.student.model import ModelConfig
from distill_jax.student.plain import AnyBatch
from distill_jax.teaching import exam_prompt
from distill_jax.tokenizer import Tokenizer, load_tokenizer
from distill_jax.training import make_objective

BYTES_PER_TOKEN = 4
"""Of a prompt, where there is no tokenizer to ask."""

MEASURED = 512
"""Prompts that are tokenised; the others are like them."""

USUAL, LONGEST = 0.5, 1.0
"""Shares of the tokens that rationales and answers may have."""


@dataclass(frozen=True)
class Texts:
    """Lengths in tokens of what a run asks.

    Attributes:
      shared: What all prompts begin with.
      prompts: Of each training question that was looked at, behind that.
      train, dev: Questions.
      measured: Whether a tokenizer counted.
    """

    shared: int
    prompts: tuple[int, ...]
    train: int
    dev: int
    measured: bool


def read_student(
    config: Config, questions: Sequence[Question]
) -> tuple[ModelConfig, Tokenizer | None]:
    """What the student looks like, and its tokenizer if there is one. Reads no weights.

    Raises:
      ValueError: there is no such model here, or none that is known.
    """
    if config.student.model == TEACHER:
        raise weights.WeightsError(
            "student.model=teacher: the teacher sits the exams, nobody else."
        )
    if config.student.model == SCRATCH:
        model, published = scratch.describe(config, questions)
        return model, Tokenizer(published)
    base = weights.find_model(config.student.model)
    model = add_adapters(config, weights.read_shape(base))
    if not (base / "tokenizer.json").is_file():
        return model, None
    ends = isinstance(model, EncoderDecoderConfig)
    return model, load_tokenizer(str(base), ends_prompts=ends)


def read_texts(config: Config, questions: Sequence[Question], tokenizer: Tokenizer | None) -> Texts:
    """Measures the prompts of the training questions.

    Raises:
      ConfigError: none of the questions is for training.
    """
    train = [question for question in questions if question.split == "train"]
    if not train:
        raise ConfigError(f"task.name={config.task.name} has no training questions to teach.")
    some = train[:: -(-len(train) // MEASURED)]
    prompts = [exam_prompt(config, question) for question in some]
    encoded: list[Sequence[int]] = [
        tokenizer.encode_prompt(text) if tokenizer else text.encode() for text in prompts
    ]
    unit = 1 if tokenizer else BYTES_PER_TOKEN
    shared = Prompts(encoded).num_common if len(encoded) > 1 else 0
    return Texts(
        shared=shared // unit,
        prompts=tuple(max(1, (len(text) - shared) // unit) for text in encoded),
        train=len(train),
        dev=sum(question.split == "dev" for question in questions),
        measured=tokenizer is not None,
    )


def make_batch(
    config: Config, model: ModelConfig, texts: Texts, *, shards: int, share: float
) -> AnyBatch:
    """A batch as a step gets it, without a word in it.

    Args:
      config: All settings.
      model: The student.
      texts: What is asked.
      shards: Parts of a mesh that rows are spread over.
      share: Of the tokens that rationales may have; `LONGEST` takes the longest prompts too.

    Raises:
      ConfigError: the prompts leave no room for a rationale.
    """
    train, objective = config.train, make_objective(config)
    endless = model.positions == "relative"
    room = model.max_positions - texts.shared
    ordered = sorted(length for length in texts.prompts if endless or length < room)
    if not ordered:
        raise ConfigError(
            f"prompts of {texts.shared + min(texts.prompts):,} tokens leave no room in a context "
            f"of {model.max_positions:,}; set task.demonstrations=[teacher], so that the student "
            "is not shown them, or name another student."
        )
    size = train.batch_size
    if share == LONGEST:
        prompts = [ordered[-1 - i % len(ordered)] for i in range(size)]
    else:
        prompts = [ordered[len(ordered) * (2 * i + 1) // (2 * size)] for i in range(size)]
    most = math.inf if endless else room - max(prompts)
    anchor, negative = (
        (0,) * int(min(max(1, share * limit), most))
        for limit in (config.teacher.max_tokens, config.exam.max_new_tokens[1])
    )
    items = [Item((0,) * length, anchor, anchor, negative) for length in prompts]
    layout: Any = plain_packing if isinstance(model, EncoderDecoderConfig) else packing
    grid = make_grid(size, microbatches=size // train.microbatch_size, shards=shards)
    shapes = layout.plan_shapes([items], grid, objective)
    shared = (0,) * max(texts.shared - 1, 0)  # the last common token stays with the rows
    return layout.pack(items, grid, shapes, shared=shared, objective=objective)


@dataclass(frozen=True)
class Round:
    """What the first round computes, if every rationale is kept.

    Attributes:
      rows: Rationales to train on.
      steps: Updates.
      useful_tokens: Of a step, without padding.
      step_flops: Of a step, forward and backward, without padding or recomputing.
      answers: That the student writes in the exam on training questions and the dev exam.
      answer_tokens: Of all those answers.
      prompt_tokens: That are read before they are written.
      exam_flops: Of reading and writing them.
    """

    rows: int
    steps: int
    useful_tokens: int
    step_flops: float
    answers: int
    answer_tokens: float
    prompt_tokens: float
    exam_flops: float


def count_round(config: Config, model: ModelConfig, texts: Texts) -> Round:
    """Counts the operations of the first round.

    Raises:
      ConfigError: the prompts leave no room for a rationale.
    """
    train, exam = config.train, config.exam
    rows = texts.train * config.teacher.samples
    batch = make_batch(config, model, texts, shards=1, share=USUAL)
    asked = texts.train + texts.dev
    greedy, drawn = (USUAL * limit for limit in exam.max_new_tokens)
    answers = asked + texts.train * exam.samples
    written = asked * greedy + texts.train * exam.samples * drawn
    prompt = sum(texts.prompts) / len(texts.prompts)
    read = 2 * texts.shared + asked * prompt  # what is common is read once per exam
    before = texts.shared + prompt
    pairs = read * before / 2 + written * (before + written / answers / 2)
    plain = replace(model, lora=None)
    return Round(
        rows=rows,
        steps=train.epochs * -(-rows // train.batch_size),
        useful_tokens=int(batch.counts.useful),
        step_flops=step_flops(model, batch.counts, make_objective(config)),
        answers=answers,
        answer_tokens=written,
        prompt_tokens=read,
        exam_flops=forward_flops(plain, tokens=read + written, predictions=written, pairs=pairs),
    )
