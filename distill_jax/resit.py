"""An exam outside the rounds of a run: of a finished run's student, or of a published model."""

import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill_jax.config import Config, ConfigError
from distill_jax.exam import passes, take_exam, vote
from distill_jax.progress import Progress
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.records import Attempt, Kind, Question, Split
from distill_jax.report.marks import greedy, mark
from distill_jax.school import find_base, open_student, split_questions
from distill_jax.teaching import exam_prompt


def resit(
    config: Config,
    folder: Path,
    *,
    split: Split,
    round_index: int,
    samples: int,
    progress: Progress,
    done: Collection[str] = (),
) -> Iterator[list[Attempt]]:
    """One round's weights answer one split of `config.task`.

    Args:
      config: Task, student and how it answers.
      folder: The run whose weights sit the exam; with round 0 of a published model, anything.
      split: Which questions.
      round_index: Which weights; 0 is the untrained student.
      samples: Drawn besides the greedy answer, as `config.exam` says.
      progress: Where to show it.
      done: Ids of questions that have been answered before and are left out.

    Yields:
      The attempts at one question, ordered by sample, as they come.

    Raises:
      ConfigError: there are no such questions or no such round.
    """
    asked = load_split(config, split)
    if set(done) >= {question.id for question in asked}:
        return
    student = open_student(config, find_base(config, folder), folder)
    generate = partial(
        student.generate,
        student.weights.get(round_index),
        samples=samples,
        seed=config.seed,
        round_index=round_index,
    )
    sitting = take_exam(
        asked, generate, prompt=partial(exam_prompt, config), round_index=round_index, done=done
    )
    title, total = f"{split} exam", len(asked)
    with progress.stage(title, total=total, unit="questions", done=len(done)) as advance:
        for attempts in sitting:
            yield attempts
            advance(1)


def load_split(config: Config, split: Split) -> list[Question]:
    """The questions of one split.

    Raises:
      ConfigError: there are none.
    """
    everything = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    asked = split_questions(everything)[split]
    if not asked:
        raise ConfigError(f"task.name={config.task.name} has no {split} questions.")
    return asked


def examine(
    config: Config,
    folder: Path,
    *,
    split: Split,
    round_index: int,
    progress: Progress,
    votes: int = 0,
) -> dict[str, Any]:
    """What one exam comes to: the greedy answers, and what samples agree on.

    Args:
      config, folder, split, round_index, progress: As of `resit`.
      votes: Samples drawn besides the greedy answer.

    Returns:
      `accuracy` with its 95% interval `low` and `high`, `questions`, `unreadable`, `cut`,
      `generated_tokens`, `seconds`; with votes also `votes`, `majority_accuracy`, the share of
      questions where most samples agree on the right answer, and `pass_at_k`, where any is right.

    Raises:
      ConfigError: there are no such questions or no such round.
    """
    start = time.monotonic()
    settings: Any = {"split": split, "round_index": round_index, "samples": votes}
    each = [*resit(config, folder, **settings, progress=progress)]
    attempts = [attempt for answered in each for attempt in answered]
    marks = mark(greedy(attempts))
    low, high = marks.interval
    return {
        "accuracy": marks.accuracy,
        "low": low,
        "high": high,
        "questions": len(each),
        "unreadable": sum(attempt.answer is None for attempt in attempts),
        "cut": sum(attempt.cut for attempt in attempts),
        "generated_tokens": sum(attempt.num_tokens for attempt in attempts),
        "seconds": round(time.monotonic() - start, 3),
        **(_count_votes(load_split(config, split), each, votes) if votes else {}),
    }


def _count_votes(
    questions: Sequence[Question], each: Sequence[Sequence[Attempt]], votes: int
) -> dict[str, Any]:
    kinds: dict[str, Kind] = {question.id: question.kind for question in questions}
    agreed = sum(vote(answered, kinds[answered[0].question_id]).correct for answered in each)
    return {
        "votes": votes,
        "majority_accuracy": agreed / len(each),
        "pass_at_k": sum(map(passes, each)) / len(each),
    }
