"""A tiny student trained from nothing on generated arithmetic text.

It learns to read, to copy and to work out single sums, but never sees a solution of several steps:
that is left to the teacher. What comes out is a Hugging Face directory like any published one.

Measured when this was set up, each alone: Muon knew 84% of sums after 26,000 examples, AdamW 69%
after 77,000. With prompt tokens at a tenth of their weight and the larger embedding, 45% of
retellings were exact after 300 steps, with only one of the two 3% and 11%.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import tokenizers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill_jax import weights
from distill_jax.config import Config
from distill_jax.packing import Item, make_grid, pack, plan_shapes
from distill_jax.progress import Progress
from distill_jax.prompts import clean_rationale, exam_prompt, target
from distill_jax.questions.arithmetic import LARGEST, PEOPLE, Story, draw_story, wordings
from distill_jax.records import Question
from distill_jax.student.model import ModelConfig, Params, init_params, logical_axes
from distill_jax.student.objective import Objective
from distill_jax.student.step import TrainState, make_step, num_row_shards, put_batch
from distill_jax.student.tree import Batch
from distill_jax.teacher.explanation import NUM_WORDINGS, explain, phrases
from distill_jax.tokenizer import Tokenizer

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
TOKEN = r" ?[A-Za-z]+| (?:[1-9][0-9]|[0-9])|[0-9]| ?[^\sA-Za-z0-9]|\s"
"""A word, a number up to `LARGEST` or a sign, each with the space before it, or white space."""

RETELLING = "Tell this story again. {story}"

ONE_STEP = 0.3  # share of stories that are asked and solved; the others are retold
LONGEST_STORY = 4  # steps of a story that is retold, or that a sum is taken from
FOREIGN = 0.5  # share of retellings that are of a task's own questions, where there are some
TIPPED = 0.2  # share of one-step solutions with a tip about a mistake, as the tutor gives it

HEADS = 4
MATRIX_RATE, OTHER_RATE = 6e-3, 2e-3
OBJECTIVE = Objective(reflection="none", prompt_weight=0.1)
"""What is asked can't be foreseen, and trying to is mostly noise."""

EMBEDDING_SCALE = 4.0  # of the usual one, which drowns in the first block's output


CARDS, STORIES = 80, 16
"""Documents of a batch; steps take a batch of either in turn."""


class Document(NamedTuple):
    """A text as in an exam: what stands there, and what is to be written."""

    prompt: str
    target: str


def make_student(
    config: Config, folder: Path, *, questions: Sequence[Question], mesh: Mesh, progress: Progress
) -> None:
    """Trains a student that is weak on purpose, and writes it as a Hugging Face directory.

    Args:
      config: Its `scratch`, `seed`, `task.arithmetic` and `student.compute_dtype` are read.
      folder: Made here, beside and renamed last: an interrupted call starts anew.
      questions: Of all splits. No document holds the text of one of them, but of a task other than
        arithmetic the training questions are retold, so that their words are known.
      mesh: Where it is trained.
      progress: Where to show the steps.

    Raises:
      ValueError: the width in `scratch` can't be cut into heads.
    """
    foreign = config.task.name != "arithmetic"
    told = [question.text for question in questions if foreign and question.split == "train"]
    model, tokenizer = describe(config, questions)
    steps = config.scratch[2]
    random, max_value = Random(f"scratch text {config.seed}"), config.task.arithmetic[1]
    exam_texts = {question.text for question in questions}
    cards = draw_cards(random, max_value=max_value)
    stories = draw_stories(random, max_value=max_value, exam_texts=exam_texts, told=told)
    backend = tokenizer.backend_tokenizer
    kinds = islice(cycle([(cards, CARDS), (stories, STORIES)]), steps)
    items = [encode(islice(documents, size), backend) for documents, size in kinds]
    grid = make_grid(CARDS, microbatches=1, shards=num_row_shards(mesh))
    shapes = plan_shapes(items, grid, OBJECTIVE, limit=2)  # one of cards and one of stories
    batches = (pack(group, grid, shapes, shared=(), objective=OBJECTIVE) for group in items)
    params = _train(config, model, batches, mesh=mesh, progress=progress)
    weights.save_model(folder, model, params, Tokenizer(tokenizer), source=None)


def describe(
    config: Config, questions: Sequence[Question]
) -> tuple[ModelConfig, PreTrainedTokenizerFast]:
    """What the student that a config asks for looks like, and its tokenizer.

    Args:
      config: Its `scratch` and `task.name` are read.
      questions: Of all splits; the tokenizer knows the words of those that are taught.

    Raises:
      ValueError: the width in `scratch` can't be cut into heads.
    """
    foreign = config.task.name != "arithmetic"
    taught = [question for question in questions if foreign and question.split == "train"]
    told = [question.text for question in taught]
    tokenizer = make_tokenizer([*told, *(question.solution for question in taught)])
    width, layers, _ = config.scratch
    return make_model(width, layers, len(tokenizer)), tokenizer


def make_model(width: int, layers: int, vocab_size: int) -> ModelConfig:
    """A small decoder of the Llama family, with ReLU: on a CPU the other bends cost a third more.

    Raises:
      ValueError: the heads would not have the same even number of dims.
    """
    if width % (2 * HEADS):
        raise ValueError(f"scratch: the width is a multiple of {2 * HEADS}; got {width}.")
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=width // HEADS,
        mlp_width=width // 3 * 8,
        max_positions=256,
        activation="relu",
        tied_head=True,
    )


def make_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and numbers that gives every text of the laboratory back.

    It knows all words of the arithmetic questions, of their prompts, of the built-in tutor and of
    `texts`, and the numbers up to `LARGEST`. A larger number is several tokens; any other word is
    unknown.

    Example:
      >>> tokenizer = make_tokenizer()
      >>> tokenizer.convert_ids_to_tokens(tokenizer("Answer: 42")["input_ids"])
      ['<s>', 'Answer', ':', ' 42']
    """
    asked = _document(RETELLING.format(story=""), "\nAnswer: 2")
    lines = ["".join(asked), *wordings(), *phrases(), *texts]
    lines += [he for _, he, _ in PEOPLE]
    words = {word for line in lines for word in re.findall(TOKEN, f" {line.strip()}")}
    words |= {"Question"}  # the one word that begins a text
    numbers = [str(digit) for digit in range(10)] + [f" {n}" for n in range(LARGEST + 1)]
    known = [UNKNOWN, BEGIN, END, *sorted(words - set(numbers)), *numbers]
    vocabulary = {token: index for index, token in enumerate(known)}
    published = tokenizers.Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    published.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(TOKEN), "isolated")
    published.decoder = decoders.Fuse()
    published.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=published, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END
    )


def draw_cards(random: Random, *, max_value: int) -> Iterator[Document]:
    """Draws flash cards without end: a sum that solutions may hold, and its result."""
    while True:
        story = draw_story(random, num_steps=LONGEST_STORY, max_value=max_value)
        for equation in story.sums:
            left, result = equation.split(" =")
            yield Document(f" {left} =", result)


def draw_stories(
    random: Random, *, max_value: int, exam_texts: Collection[str], told: Sequence[str] = ()
) -> Iterator[Document]:
    """Draws stories without end: problems of one step with their solution, and retellings.

    Without retellings, word for word, a student goes on copying wrong numbers for ever.

    Args:
      random: Decides everything.
      max_value: As of the questions that the student will be asked.
      exam_texts: Texts of questions that must not occur, neither asked nor retold.
      told: Texts that half of the retellings are of; none if empty.
    """
    while True:
        solved = random.random() < ONE_STEP
        num_steps = 1 if solved else random.randint(1, LONGEST_STORY)
        story = draw_story(random, num_steps=num_steps, max_value=max_value)
        if story.question in exam_texts:
            continue
        if solved:
            yield _document(story.question, _solution(story, random))
        else:
            foreign = told and random.random() < FOREIGN
            text = random.choice(told) if foreign else story.text
            yield _document(RETELLING.format(story=text), f" {text}")


def encode(documents: Iterable[Document], tokenizer: tokenizers.Tokenizer) -> list[Item]:
    """Documents as rows of a batch: the prompt, and the target as its anchor.

    Args:
      documents: Of one batch.
      tokenizer: The one inside that of `make_tokenizer`.
    """
    prompts, targets = (
        [encoded.ids for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for texts in zip(*documents, strict=True)
    )
    begin, end = (tokenizer.get_vocab()[token] for token in (BEGIN, END))
    return [
        Item((begin, *prompt), (*target, end))
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def _document(asked: str, target: str) -> Document:
    question = Question("", asked, "", "train", "numeric")
    return Document(exam_prompt(question, demonstrations=""), target)


def _solution(story: Story, random: Random) -> str:
    """The target for a question, in the tutor's words, some with a tip about a mistake."""
    question = Question(
        "", story.question, str(story.result), "train", "numeric", solution=story.solution
    )
    way, seed = random.randrange(NUM_WORDINGS), str(random.random())
    mistake = None
    if random.random() < TIPPED:
        mistake = explain(question, mistake=None, wrong=True, way=way, seed=seed)
    told = explain(question, mistake=mistake, wrong=False, way=way, seed=seed)
    return target(question, clean_rationale(told))


def _train(
    config: Config, model: ModelConfig, batches: Iterator[Batch], *, mesh: Mesh, progress: Progress
) -> Params:
    """The weights, whole on every device: the student is too small to be spread."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = init_params(model, jax.random.key(config.seed), everywhere)
    params["embedding"] *= EMBEDDING_SCALE
    *_, steps = config.scratch
    optimizer = make_optimizer(model, steps)
    opt_state = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    state = TrainState(jnp.zeros((), jnp.int32, device=everywhere), params, opt_state)
    step = make_step(
        model,
        optimizer,
        OBJECTIVE,
        mesh=mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        remat="dots",
    )
    with progress.stage("training a student from nothing", total=steps, unit="steps") as advance:
        for batch in batches:
            state, figures = step(state, put_batch(batch, mesh))
            advance(1, f"loss {float(figures['loss']):.3f}")
    return state.params


def make_optimizer(model: ModelConfig, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Adam for the rest, both with a cosine down to 0.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def sides(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
        """Which dims of a weight go in and which come out; None for what is no matrix."""
        if axes[0] != "layers" or "embed" not in axes:
            return None
        embed = axes.index("embed")
        others = tuple(dim for dim in range(1, len(axes)) if dim != embed)
        return MuonDimensionNumbers(*(((embed,), others) if embed == 1 else (others, (embed,))))

    matrices = jax.tree.map(sides, logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    return optax.contrib.muon(
        optax.cosine_decay_schedule(MATRIX_RATE, steps),
        muon_weight_dimension_numbers=matrices,
        adam_learning_rate=optax.cosine_decay_schedule(OTHER_RATE, steps),
        adam_b2=0.99,
        consistent_rms=0.2,  # updates as large as Adam's
    )
