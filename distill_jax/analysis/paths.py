"""Right and wrong reasoning paths of the same questions, and what a student makes of them.

Letters: N texts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from distill_jax import packing, plain_packing
from distill_jax.batches import Packing
from distill_jax.config import Config
from distill_jax.packing import Grid, Item, Tokens, find_branches, make_grid
from distill_jax.prompts import clean_rationale
from distill_jax.records import Attempt, Lesson, Question, Rationale
from distill_jax.report.cases import evenly
from distill_jax.report.files import finished_rows, round_folders
from distill_jax.rows import make_rows
from distill_jax.run_folder import read_records
from distill_jax.school import Student
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.model import ModelConfig, Params
from distill_jax.student.objective import Objective, Readings, read_pairs
from distill_jax.student.step import bind_states, num_row_shards, put_batch
from distill_jax.teaching import exam_prompt

Writer = Literal["teacher", "student"]
MAX_TEXTS = 4  # right ones of a question, and wrong ones
BATCH = 16
_PAIRS = Objective(reflection="ranking")
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Paths:
    """Right and wrong texts of questions that have both.

    Attributes:
      questions: By id.
      right: At most `MAX_TEXTS` of each question.
      wrong: The student's wrong samples, likewise.
    """

    questions: dict[str, Question]
    right: tuple[Rationale, ...]
    wrong: tuple[Attempt, ...]


class Scores(NamedTuple):
    """N texts, as one student reads them."""

    question_ids: list[str]
    right: Bool[Array, " N"]
    likelihoods: Float[Array, " N"]  # mean `log p` of a token, in nats
    states: Float[Array, "N D"]  # at the last token, after the final norm


def gather_paths(folder: Path, *, right: Writer, limit: int) -> Paths:
    """The texts of a run's training questions.

    Wrong ones are the student's samples in the last exam on them, or its greedy answers if no
    sample is wrong. Right ones are what was kept of the teacher's answers in all rounds, or
    the right samples and greedy answers of that exam.

    Args:
      folder: The run.
      right: Who wrote the right texts.
      limit: Questions, at most; evenly spaced in question order.

    Raises:
      ValueError: no question has both.
    """
    rounds = round_folders(folder)
    exams = [path for path in rounds.values() if (path / "exam.jsonl").exists()]
    exam = [*finished_rows(exams[-1], "exam", Attempt)] if exams else []
    kept = _taught(rounds.values()) if right == "teacher" else _own(exam)
    found = {row.id: row for row in read_records(folder / "questions.jsonl", Question)}
    mistakes = [attempt for attempt in exam if not attempt.correct and attempt.text.strip()]
    wrong = _most([attempt for attempt in mistakes if attempt.sample_index] or mistakes)
    both = {row.question_id for row in kept} & {attempt.question_id for attempt in wrong}
    chosen = evenly([name for name in found if name in both], limit)
    if not chosen:
        raise ValueError(
            f"{folder} has no training question with right and wrong texts; with exam.samples of 1 "
            "or more the student writes several of each."
        )
    return Paths(
        {name: found[name] for name in chosen},
        tuple(row for row in _most(kept) if row.question_id in chosen),
        tuple(attempt for attempt in wrong if attempt.question_id in chosen),
    )


def _taught(folders) -> list[Rationale]:
    lessons = (finished_rows(path, "lesson", Rationale) for path in folders)
    return [row for lesson in lessons for row in Lesson(tuple(lesson)).kept]


def _own(exam: Sequence[Attempt]) -> list[Rationale]:
    """The student's right texts, in the form of rationales."""
    texts = ((attempt, clean_rationale(attempt.text)) for attempt in exam if attempt.correct)
    return [
        Rationale(a.question_id, a.round_index + 1, a.sample_index, text, a.answer, "kept")
        for a, text in texts
        if text
    ]


def _most(rows):
    """The first `MAX_TEXTS` different texts of each question, in order."""
    texts: dict[str, set[str]] = {}
    kept = []
    for row in rows:
        mine = texts.setdefault(row.question_id, set())
        if row.text not in mine and len(mine) < MAX_TEXTS:
            mine.add(row.text)
            kept.append(row)
    return kept


def score_paths(config: Config, student: Student, params: Params, paths: Paths) -> Scores:
    """What a student makes of every text behind its exam prompt.

    Texts are those that training would see: a right one with the gold answer behind it, a wrong
    one with its own. What is too long for the student is left out, as in training.

    Args:
      config: The student's settings: demonstrations and number format.
      student: The student.
      params: Its weights.
      paths: The texts.

    Raises:
      ValueError: no question has a right and a wrong text that fit the student.
    """
    rows = make_rows(
        paths.right,
        paths.wrong,
        paths.questions,
        tokenizer=student.tokenizer,
        prompts={config.train.targets[0]: partial(exam_prompt, config)},
        max_length=student.model.max_positions,
        seed=config.seed,
    )
    texts: dict[str, tuple[dict[Tokens, None], tuple[Tokens, ...], Tokens]] = {}
    for row in rows:
        rights, _, _ = texts.setdefault(row.question_id, ({}, row.negatives, row.question))
        rights[row.anchor] = None
    items: dict[str, list[Item]] = {
        name: _pair(list(rights), wrongs, prompt)
        for name, (rights, wrongs, prompt) in texts.items()
        if wrongs
    }
    every = [item for mine in items.values() for item in mine]
    if not every:
        raise ValueError(
            f"none of the texts fits the student's {student.model.max_positions} tokens with its "
            "prompt; task.demonstrations=[] makes prompts shorter."
        )
    read = _read(config, student, params, every, rows.shared)
    return _collect(items, read)


def _pair(rights: Sequence[Tokens], wrongs: Sequence[Tokens], prompt: Tokens) -> list[Item]:
    """Pairs in which every text of a question occurs."""
    number = max(len(rights), len(wrongs))
    return [
        Item(prompt, rights[i % len(rights)], (), wrongs[i % len(wrongs)]) for i in range(number)
    ]


def _read(
    config: Config, student: Student, params: Params, items: Sequence[Item], shared: Tokens
) -> dict[Item, tuple[Array, Array]]:
    """Mean log likelihoods and states of both texts of every pair."""
    layout = _find_layout(student.model)
    grid = make_grid(BATCH, microbatches=1, shards=num_row_shards(student.mesh))
    ordered = sorted(items, key=lambda item: sum(map(len, item)))
    batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    shapes = layout.plan_shapes(batches, grid, _PAIRS)
    dtype = jnp.dtype(config.student.compute_dtype)
    states = bind_states(student.model, student.mesh, compute_dtype=dtype, remat="none")
    read = jax.jit(partial(read_pairs, student.model, states=states))
    found = {}
    for batch in batches:
        packed = put_batch(
            layout.pack(batch, grid, shapes, shared=shared, objective=_PAIRS), student.mesh
        )
        whole = packed._replace(counts=None)  # pyright: ignore
        readings: Readings = jax.device_get(read(params, jax.tree.map(lambda x: x[0], whole)))
        found |= _place(batch, grid, readings)
    return found


def _find_layout(model: ModelConfig) -> Packing:
    return plain_packing if isinstance(model, EncoderDecoderConfig) else packing


def _place(batch: Sequence[Item], grid: Grid, readings: Readings) -> dict[Item, tuple]:
    """Which row of which shard holds which pair; equal pairs have equal readings."""
    groups = packing.spread(batch, grid, find_branches(_PAIRS))
    means = readings.likelihoods / readings.lengths
    return {
        item: (means[shard, row], readings.states[shard, row])
        for shard, group in enumerate(groups)
        for row, item in enumerate(group)
    }


def _collect(items: dict[str, list[Item]], read: dict[Item, tuple[Array, Array]]) -> Scores:
    """Every text once."""
    found: dict[tuple[str, bool, Tokens], tuple[float, Array]] = {}
    for name, mine in items.items():
        for item in mine:
            means, states = read[item]
            for place, text in enumerate((item.anchor, item.negative)):
                found[name, not place, text] = (float(means[place]), states[place])
    keys, values = list(found), list(found.values())
    return Scores(
        [name for name, _, _ in keys],
        np.array([right for _, right, _ in keys]),
        np.array([likelihood for likelihood, _ in values]),
        np.stack([state for _, state in values]),
    )
