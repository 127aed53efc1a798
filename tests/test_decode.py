"""Decoding with forks and a cache, against one whole forward pass per token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distill_jax import tokenizer
from distill_jax.student import decode
from distill_jax.student.decode import Answers, Prompts, Stops, answer, plan_stages
from distill_jax.student.model import (
    ModelConfig,
    Params,
    abstract_params,
    forward,
    init_params,
    logical_axes,
    logits,
)
from distill_jax.student.sampling import Sampling, draw, uniforms
from distill_jax.student.sharding import EXAM_RULES, make_mesh, shardings

TINY = ModelConfig(
    vocab_size=90, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
    max_positions=64,
)  # fmt: skip
LEARNED = ModelConfig(
    vocab_size=90, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp_width=48,
    max_positions=40, norm="layer", positions="learned", activation="gelu_new", gated_mlp=False,
)  # fmt: skip
SAMPLING = Sampling(temperature=1.2, top_k=30, top_p=0.95)
NOTHING = np.zeros(90, np.uint8)

Student = tuple[ModelConfig, Params]


def make_stops(flags: np.ndarray, end_id: int = -1) -> Stops:
    return Stops(jnp.asarray(end_id, jnp.int32), jnp.asarray(flags))


def make_student(config: ModelConfig) -> Student:
    layout = shardings(
        make_mesh(1, 1, 1), logical_axes(config), abstract_params(config), EXAM_RULES
    )
    return config, init_params(config, jax.random.key(1), layout)


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student(TINY)


def make_prompts() -> Prompts:
    """Five prompts of unequal length, with 12 greedy tokens and two samples of 7 each.

    All tests ask with these shapes, so that there is little to compile.
    """
    rng = np.random.default_rng(0)
    lengths, rows = [3, 9, 1, 5, 6], 3
    count, longest = len(lengths), max(lengths) + 2
    limit = np.full((count, rows), 7, np.int32)
    limit[:, 0] = 12
    return Prompts(
        jnp.asarray(rng.integers(0, 90, (count, longest)), jnp.int32),
        jnp.arange(longest)[None] < jnp.asarray(lengths)[:, None],
        jnp.asarray(limit),
        jnp.asarray(rng.integers(0, 2**32, (count, rows, 2), dtype=np.uint32)),
    )


compiled = jax.jit(
    partial(answer, sampling=SAMPLING, compute_dtype=jnp.float32),
    static_argnums=0,
    static_argnames="stages",
)


def run(student: Student, shared: list[int], prompts: Prompts, stops: Stops) -> Answers:
    config, params = student
    past = ()
    if shared:
        width = len(shared) + 3  # padded, as an exam pads it
        tokens = jnp.asarray([[*shared, 0, 0, 0]], jnp.int32)
        mask = jnp.arange(width)[None] < len(shared)
        places = jnp.arange(width)[None]
        past = (forward(config, params, tokens, places, mask, compute_dtype=jnp.float32)[1],)
    samples = prompts.limits.shape[1] - 1
    stages = plan_stages(greedy=12, sampled=7, samples=samples, first=6)
    return jax.device_get(compiled(config, params, past, prompts, stops, stages=stages))


@partial(jax.jit, static_argnums=0)
def next_scores(
    config: ModelConfig, params: Params, tokens: jax.Array, last: jax.Array
) -> jax.Array:
    places = jnp.arange(tokens.shape[1])[None]
    mask = jnp.ones(tokens.shape, bool)
    hidden, _ = forward(config, params, tokens, places, mask, compute_dtype=jnp.float32)
    return logits(config, params, hidden[:, last])


def slowly(student: Student, prompt: list[int], key: jax.Array | None, count: int) -> list[int]:
    """The completion without cache, fork or batch; no `key` for the greedy one."""
    text = list(prompt)
    for place in range(count):
        padded = jnp.asarray([text + [0] * (36 - len(text))], jnp.int32)
        row = next_scores(*student, padded, jnp.asarray(len(text) - 1))
        if key is None:
            text.append(int(jnp.argmax(row)))
        else:
            uniform = uniforms(key[None], jnp.asarray(place))
            text.append(int(jax.jit(draw, static_argnums=2)(row, uniform, SAMPLING)[0]))
    return text[len(prompt) :]


@pytest.mark.parametrize("shared", [[], list(range(5, 16))], ids=["alone", "shared"])
@pytest.mark.parametrize("config", [TINY, LEARNED], ids=["rotary", "learned"])
def test_every_row_gets_what_a_plain_loop_gives(config, shared):
    student = make_student(config)
    # Stages of 6, 7 and 12 tokens; the samples leave after 7.
    prompts = make_prompts()
    answers = run(student, shared, prompts, make_stops(NOTHING))
    assert not answers.stopped.any()
    np.testing.assert_array_equal(answers.num_tokens, prompts.limits)
    for question, row in np.ndindex(5, 3):
        text = shared + prompts.tokens[question][prompts.mask[question]].tolist()
        count = int(prompts.limits[question, row])
        expected = slowly(student, text, prompts.keys[question, row] if row else None, count)
        assert answers.tokens[question, row].tolist() == expected + [0] * (12 - count)


def cut(tokens: list[int], end_id: int, flags: np.ndarray) -> tuple[list[int], bool]:
    """The tokens up to the first stop, by looking at the text as a whole."""
    marks = {0: "x", 1: "\nx", 2: "x\n", 3: "\n", 4: "x\n\nx", 7: "\n\n"}
    for place, token in enumerate(tokens):
        text = "".join(marks[int(flags[t])] for t in tokens[: place + 1])
        if token == end_id or "\n\n" in text:
            return tokens[: place + 1], True
    return tokens, False


def test_rows_stop_at_the_end_token_and_at_a_blank_line(student):
    prompts = make_prompts()
    free = run(student, [], prompts, make_stops(NOTHING))
    rng = np.random.default_rng(5)
    seen = []
    for _ in range(8):
        flags = rng.choice([0, 1, 2, 3, 4, 7], 90, p=[0.5, 0.15, 0.15, 0.1, 0.05, 0.05])
        end_id = int(rng.integers(90))
        stops = make_stops(flags.astype(np.uint8), end_id)
        answers = run(student, [], prompts, stops)
        for place in np.ndindex(5, 3):
            expected, stopped = cut(
                free.tokens[place][: prompts.limits[place]].tolist(), end_id, flags
            )
            got = answers.tokens[place].tolist()
            assert got == expected + [0] * (12 - len(expected))
            assert answers.num_tokens[place] == len(expected)
            assert answers.stopped[place] == stopped
            seen.append((len(expected), stopped))
    assert len({count for count, _ in seen}) > 5
    assert {stopped for _, stopped in seen} == {True, False}


def test_a_single_newline_at_the_beginning_is_not_a_blank_line(student):
    prompts = make_prompts()
    free = run(student, [], prompts, make_stops(NOTHING))
    flags = NOTHING.copy()
    flags[prompts.tokens[0, 2]] = decode.ENDS  # the prompt's last token says nothing about it
    flags[free.tokens[0, 0, 0]] = decode.BEGINS | decode.ENDS
    answers = run(student, [], prompts, make_stops(flags))
    assert answers.tokens[0, 0, 0] == free.tokens[0, 0, 0]
    assert answers.num_tokens[0, 0] > 1


def test_newline_bits_are_those_of_the_tokenizer():
    ours = (decode.BEGINS, decode.ENDS, decode.BLANK)
    assert ours == (tokenizer.BEGINS, tokenizer.ENDS, tokenizer.BLANK)


def test_ids_without_a_meaning_are_never_chosen(student):
    prompts = make_prompts()
    wide = run(student, [], prompts, make_stops(NOTHING))
    narrow = run(student, [], prompts, make_stops(NOTHING[:20]))
    assert wide.tokens.max() >= 20
    assert narrow.tokens.max() < 20


def test_each_row_has_its_own_limit(student):
    prompts = make_prompts()
    limits = np.array([[0, 0, 0], [1, 7, 3], [5, 0, 6], [12, 1, 1], [2, 3, 4]], np.int32)
    free = run(student, [], prompts, make_stops(NOTHING))
    prompts = prompts._replace(limits=jnp.asarray(limits))
    answers = run(student, [], prompts, make_stops(NOTHING))
    np.testing.assert_array_equal(answers.num_tokens, limits)
    kept = np.arange(12) < limits[..., None]
    np.testing.assert_array_equal(answers.tokens, np.where(kept, free.tokens, 0))


def test_samples_of_many_questions_follow_the_exact_probabilities(student):
    tokens = jnp.tile(jnp.array([7, 3, 11], jnp.int32), (300, 1))
    keys = np.random.default_rng(6).integers(0, 2**32, (300, 11, 2), dtype=np.uint32)
    limits = jnp.ones((300, 11), jnp.int32)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), limits, jnp.asarray(keys))
    answers = run(student, [], prompts, make_stops(NOTHING))
    row = next_scores(*student, tokens[:1], jnp.asarray(2))
    scores = np.asarray(row[0, :90], np.float64)
    scores /= SAMPLING.temperature
    chance = np.where(scores >= np.sort(scores)[-SAMPLING.top_k], np.exp(scores), 0)
    chance /= chance.sum()
    above = np.array([chance[chance > c].sum() for c in chance])
    chance = np.where(above < SAMPLING.top_p, chance, 0)
    counts = np.bincount(answers.tokens[:, 1:, 0].ravel(), minlength=90)
    kept = chance > 0
    assert counts[~kept].sum() == 0
    wanted = chance[kept] / chance.sum() * counts.sum()
    assert stats.chisquare(counts[kept], wanted).pvalue > 1e-4
    assert (answers.tokens[:, 0, 0] == scores.argmax()).all()
