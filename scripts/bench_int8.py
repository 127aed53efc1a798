"""What an exam would gain and lose with keys and values kept as int8: points, bytes and time.

    python scripts/bench_int8.py runs/quickstart

Every number is rounded to 127 steps of the largest of its token and head, as an int8 cache with one
scale for each would hold it; a student sits the test exam with and without. Then one layer's
attention of 128 rows to 336 pages is timed with pages of each kind.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from distill_jax.config import Config
from distill_jax.config_file import load_config, override
from distill_jax.engine import Engine, Weights
from distill_jax.exam import take_exam
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.records import Attempt
from distill_jax.school import find_base, open_student
from distill_jax.student import decode
from distill_jax.student.attention import Route, Stretch, Turned, attend
from distill_jax.student.sampling import Sampling
from distill_jax.teaching import exam_prompt

SLOTS, PAGES, HEADS, DIM, TOKENS = 128, 336, 8, 64, 32


class RoundedEngine(Engine):
    """An engine whose pages hold what int8 can hold."""

    def _forward(self, weights: Weights) -> decode.Forward:
        run = super()._forward(weights)

        def rounded(*stretch: Any) -> Any:
            hidden, segment = run(*stretch)
            assert isinstance(segment.keys, jax.Array)
            keys, values = (jnp.multiply(*to_int8(x, -1)) for x in (segment.keys, segment.values))
            return hidden, segment._replace(keys=keys, values=values)

        return rounded


def to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Whole numbers, and what each vector of them is multiplied by."""
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale


def main(folder: Path, round_index: int = 3, questions: int = 600) -> None:
    """Prints points with pages as they are and rounded, and what attention to each kind costs."""
    changes = [f"folder={folder}", f"task.num_test={questions}", "student.compute_dtype=float32"]
    config = override(load_config(folder / "config.yaml"), changes)
    figures = {"exam": count_points(config, folder, round_index), "attention": time_attention()}
    print(json.dumps(figures, indent=2))


def count_points(config: Config, folder: Path, round_index: int) -> dict[str, int]:
    """Right answers of both exams, and how many texts differ."""
    every = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    asked = [question for question in every if question.split == "test"]
    student = open_student(config, find_base(config, folder), folder)
    params, tokenizer = student.weights.get(round_index), student.tokenizer

    def sit(kind: type[Engine]) -> list[Attempt]:
        engine = kind(
            student.model,
            student.generate.engine.mesh,
            end_id=-1 if tokenizer.end_id is None else tokenizer.end_id,
            newlines=tokenizer.newlines,
            sampling=Sampling(),
            compute_dtype="float32",
        )
        generate = dataclasses.replace(student.generate, engine=engine)
        call = partial(generate, params, samples=0, seed=0, round_index=round_index)
        exam = take_exam(asked, call, prompt=partial(exam_prompt, config), round_index=round_index)
        return sorted((row for rows in exam for row in rows), key=lambda row: row.question_id)

    plain, rounded = sit(Engine), sit(RoundedEngine)
    return {
        "questions": len(asked),
        "points": sum(row.correct for row in plain),
        "points_int8": sum(row.correct for row in rounded),
        "texts_changed": sum(x.text != y.text for x, y in zip(plain, rounded, strict=True)),
    }


def time_attention() -> dict[str, dict[str, float]]:
    """CPU milliseconds of one layer, megabytes of its pages, and megabytes held meanwhile."""
    rng = np.random.default_rng(0)
    query, keys, values = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (
            (SLOTS, 1, HEADS, DIM), (PAGES, HEADS, DIM, TOKENS), (PAGES, HEADS, TOKENS, DIM),
        )
    )  # fmt: skip
    places = jnp.asarray(rng.integers(0, PAGES, (SLOTS, 4)))
    route = Route(jnp.asarray(rng.integers(0, SLOTS, (PAGES, 1))), places)

    def look(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        seen = jnp.ones((PAGES, 1, TOKENS), bool)
        return attend(query, [Stretch(Turned(keys), values, seen, route)], scale=0.1, cap=None)

    def look_int8(query: jax.Array, keys: Any, values: Any) -> jax.Array:
        return look(query, keys[0] * keys[1], values[0] * values[1])

    kinds: dict[str, tuple[Any, Any, Any]] = {
        "float32": (look, keys, values),
        "int8": (look_int8, to_int8(keys, 2), to_int8(values, 3)),
    }
    return {name: measure(call, query, *pages) for name, (call, *pages) in kinds.items()}


def measure(call: Any, query: jax.Array, *pages: Any) -> dict[str, float]:
    """The least of sixty: other programs only add."""
    program: Any = jax.jit(call).lower(query, *pages).compile()
    times = []
    for _ in range(60):
        start = time.process_time()
        jax.block_until_ready(program(query, *pages))
        times.append(time.process_time() - start)
    return {
        "cpu_milliseconds": round(1e3 * min(times), 2),
        "pages_megabytes": round(sum(x.nbytes for x in jax.tree.leaves(pages)) / 1e6, 1),
        "held_megabytes": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }


if __name__ == "__main__":
    typer.run(main)
