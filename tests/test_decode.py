"""Decoding with forks, pages and refilled slots, against one whole forward pass per token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distill_jax import tokenizer
from distill_jax.engine import Engine
from distill_jax.generate import sit
from distill_jax.slots import Prompt, Row
from distill_jax.student import decode
from distill_jax.student.architecture import ModelConfig
from distill_jax.student.model import (
    Params,
    abstract_params,
    forward,
    init_params,
    logical_axes,
    logits,
)
from distill_jax.student.sampling import Sampling, choose
from distill_jax.student.sharding import EXAM_RULES, make_mesh, shardings

TINY = ModelConfig(
    vocab_size=90, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
    max_positions=128,
)  # fmt: skip
LEARNED = ModelConfig(
    vocab_size=90, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp_width=48,
    max_positions=128, norm="layer", positions="learned", activation="gelu_new", gated_mlp=False,
)  # fmt: skip
WINDOWED = ModelConfig(
    vocab_size=90, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
    max_positions=128, local_layers=(True, False), window=17,
)  # fmt: skip
SAMPLING = Sampling(temperature=0.5, top_k=30, top_p=0.95)
NOTHING = np.zeros(90, np.uint8)
LENGTHS, LIMITS = [3, 40, 1, 5, 34], [36, 7, 7]

Student = tuple[ModelConfig, Params]
Found = dict[tuple[int, int], Row]


def make_student(config: ModelConfig) -> Student:
    layout = shardings(
        make_mesh(1, 1, 1), logical_axes(config), abstract_params(config), EXAM_RULES
    )
    return config, init_params(config, jax.random.key(1), layout)


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student(TINY)


def make_prompts(limits: np.ndarray | None = None) -> list[Prompt]:
    """Five prompts on none, one or two pages; the greedy row of each needs two, a sample one."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, rng.integers(0, 90, size).tolist()) for i, size in enumerate(LENGTHS)]
    for prompt in prompts:
        keys = rng.integers(0, 2**32, (3, 2), dtype=np.uint32)
        limit = LIMITS if limits is None else limits[prompt.index]
        prompt.rows = [Row(prompt, place, int(limit[place]), keys[place]) for place in range(3)]
    return prompts


def run(
    student: Student,
    prompts: list[Prompt],
    *,
    shared: list[int] | None = None,
    flags: np.ndarray = NOTHING,
    end_id: int = -1,
) -> Found:
    """The rows of all prompts, answered in eight slots: seven of fifteen rows are refilled."""
    config, params = student
    engine = Engine(
        config,
        make_mesh(1, 1, 1),
        end_id=end_id,
        newlines=flags,
        sampling=SAMPLING,
        compute_dtype=jnp.float32,
    )
    weights = engine.lay_out(params)
    found = sit(engine, weights, shared or [], prompts, owed=range(len(prompts)), slots=8)
    return {(prompt.index, row.place): row for prompt in found for row in prompt.rows}


@partial(jax.jit, static_argnums=0)
def next_scores(
    config: ModelConfig, params: Params, tokens: jax.Array, last: jax.Array
) -> jax.Array:
    places = jnp.arange(tokens.shape[1])[None]
    mask = jnp.ones(tokens.shape, bool)
    hidden, _ = forward(config, params, tokens, places, mask, compute_dtype=jnp.float32)
    return logits(config, params, hidden[:, last])


choose_compiled = jax.jit(choose, static_argnums=4)


def slowly(student: Student, shared: list[int], row: Row) -> list[int]:
    """The completion without pages, forks, slots or neighbours."""
    text = [*shared, *row.prompt.tokens]
    start = len(text)
    for place in range(row.limit):
        padded = jnp.asarray([text + [0] * (96 - len(text))], jnp.int32)
        scores = next_scores(*student, padded, jnp.asarray(len(text) - 1))
        greedy = jnp.asarray([row.place == 0])
        key, step = jnp.asarray(row.key[None]), jnp.asarray([place])
        text.append(int(choose_compiled(scores, key, step, greedy, SAMPLING)[0]))
    return text[start:]


@pytest.mark.parametrize(
    ("config", "shared"),
    [(TINY, []), (TINY, list(range(5, 16))), (LEARNED, [4, 3]), (WINDOWED, list(range(7, 18)))],
    ids=["alone", "shared", "learned", "windowed"],
)
def test_every_row_gets_what_a_plain_loop_gives(config, shared):
    student = make_student(config)
    found = run(student, make_prompts(), shared=shared)
    assert len(found) == 15
    for row in found.values():
        assert not row.stopped
        assert row.chosen == slowly(student, shared, row)


def cut(tokens: list[int], end_id: int, flags: np.ndarray) -> tuple[list[int], bool]:
    """The tokens up to the first stop, by looking at the text as a whole."""
    marks = {0: "x", 1: "\nx", 2: "x\n", 3: "\n", 4: "x\n\nx", 7: "\n\n"}
    for place, token in enumerate(tokens):
        text = "".join(marks[int(flags[t])] for t in tokens[: place + 1])
        if token == end_id or "\n\n" in text:
            return tokens[: place + 1], True
    return tokens, False


def test_rows_stop_at_the_end_token_and_at_a_blank_line(student):
    free = run(student, make_prompts())
    rng = np.random.default_rng(5)
    seen = []
    for _ in range(6):
        flags = rng.choice([0, 1, 2, 3, 4, 7], 90, p=[0.7, 0.1, 0.1, 0.05, 0.03, 0.02])
        end_id = int(rng.integers(90))
        found = run(student, make_prompts(), flags=flags.astype(np.uint8), end_id=end_id)
        for place, row in found.items():
            assert (row.chosen, row.stopped) == cut(free[place].chosen, end_id, flags)
            seen.append((len(row.chosen), row.stopped))
    assert len({count for count, _ in seen}) > 5
    assert {stopped for _, stopped in seen} == {True, False}


def test_a_single_newline_at_the_beginning_is_not_a_blank_line(student):
    prompts = make_prompts()
    free = run(student, prompts)[0, 0].chosen
    flags = NOTHING.copy()
    flags[prompts[0].tokens[-1]] = decode.ENDS  # the prompt's last token says nothing about it
    flags[free[0]] = decode.BEGINS | decode.ENDS
    row = run(student, make_prompts(), flags=flags)[0, 0]
    assert row.chosen[0] == free[0]
    assert len(row.chosen) > 1


def test_newline_bits_are_those_of_the_tokenizer():
    ours = (decode.BEGINS, decode.ENDS, decode.BLANK)
    assert ours == (tokenizer.BEGINS, tokenizer.ENDS, tokenizer.BLANK)


def test_ids_without_a_meaning_are_never_chosen(student):
    wide = run(student, make_prompts())
    narrow = run(student, make_prompts(), flags=NOTHING[:20])
    assert max(max(row.chosen) for row in wide.values()) >= 20
    assert max(max(row.chosen) for row in narrow.values()) < 20


def test_each_row_has_its_own_limit(student):
    free = run(student, make_prompts())
    limits = np.array([[1, 7, 3], [33, 1, 6], [5, 2, 7], [32, 1, 1], [2, 3, 4]])
    for place, row in run(student, make_prompts(limits)).items():
        assert row.chosen == free[place].chosen[: limits[place]]


def test_samples_of_many_questions_follow_the_exact_probabilities(student):
    keys = np.random.default_rng(6).integers(0, 2**32, (3000, 2), dtype=np.uint32)
    prompts = [Prompt(index, [7, 3, 11]) for index in range(300)]
    for prompt, own in zip(prompts, np.split(keys, 300), strict=True):
        prompt.rows = [Row(prompt, place, 1, key) for place, key in enumerate(own, 1)]
    found = run(student, prompts)
    row = next_scores(*student, jnp.asarray([[7, 3, 11]]), jnp.asarray(2))
    scores = np.asarray(row[0, :90], np.float64) / SAMPLING.temperature
    chance = np.where(scores >= np.sort(scores)[-SAMPLING.top_k], np.exp(scores), 0)
    chance /= chance.sum()
    above = np.array([chance[chance > c].sum() for c in chance])
    chance = np.where(above < SAMPLING.top_p, chance, 0)
    counts = np.bincount([row.chosen[0] for row in found.values()], minlength=90)
    kept = chance > 0
    assert counts.sum() == 3000
    assert counts[~kept].sum() == 0
    wanted = chance[kept] / chance.sum() * counts.sum()
    assert stats.chisquare(counts[kept], wanted).pvalue > 1e-4
