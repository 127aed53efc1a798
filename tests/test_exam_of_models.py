"""Exams that are sat by real weights, or cut by a real tokenizer."""

import dataclasses
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from random_models import make_params, variant, whole
from test_generate import Spelled

from distill_jax.config import ExamConfig
from distill_jax.exam import take_exam
from distill_jax.generate import make_generate
from distill_jax.records import Question
from distill_jax.report.marks import Marks, mark
from distill_jax.student.sharding import make_mesh
from distill_jax.tokenizer import load_tokenizer
from distill_jax.weights import load_params, read_model_config


def examine_adder(directory: Path, count: int) -> Marks:
    """Marks of `mathgpt-add3` for so many sums of two numbers below 1000."""
    config = read_model_config(directory)
    params = load_params(directory, config, whole(config))
    pairs = np.random.default_rng(0).integers(0, 1000, (count, 2))
    questions = [
        Question(f"add/{i}", f"{a:03}{b:03}", str(a + b), "test", "numeric")
        for i, (a, b) in enumerate(pairs)
    ]
    exam = ExamConfig(samples=0, max_new_tokens=(4, 4), slots=100)
    tokenizer = load_tokenizer(str(directory))
    generate = make_generate(
        config, tokenizer, make_mesh(1, 1, 1), exam=exam, compute_dtype=jnp.float32
    )
    sitting = partial(generate, params, samples=0, seed=0, round_index=0)
    attempts = take_exam(questions, sitting, prompt=lambda q: q.text, round_index=0)
    return mark([attempt for answered in attempts for attempt in answered])


def test_a_real_model_adds_at_the_published_rate(shared):
    """About 990 of 1000; `examine_adder(directory, 10_000)` marked 9,857 of 10,000 right."""
    marks = examine_adder(shared / "models" / "mathgpt-add3", 300)
    assert marks.num_questions == 300
    assert marks.num_unreadable == 0
    assert marks.accuracy >= 0.97


def test_rows_that_pad_a_vocabulary_are_never_drawn(shared):
    """GPT-J has 50400 rows for 50257 tokens; here the others are by far the likeliest."""
    tokenizer = Spelled(load_tokenizer(str(shared / "models" / "tokenizers" / "gpt-j")))
    config = dataclasses.replace(variant("gptj"), vocab_size=50400, layers=1)
    params = make_params(config)
    params["head_bias"] = params["head_bias"].at[50257:].set(50.0)
    exam = ExamConfig(samples=3, max_new_tokens=(8, 8), slots=8)
    generate = make_generate(
        config, tokenizer, make_mesh(1, 1, 1), exam=exam, compute_dtype=jnp.float32
    )
    prompts = ["Question: 3 + 4?\nReasoning:", "Question: 5 + 6?\nReasoning:"]
    answered = dict(generate(params, prompts, prompts, samples=3, seed=0, round_index=0))
    ids = [i for two in answered.values() for said in two for i in map(int, said.text.split())]
    assert len(ids) > 8
    assert max(ids) < 50257
