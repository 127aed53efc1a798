"""Prompt ids to completion ids on the device: prefill once, fork, decode.

All prompts of an exam begin with the same tokens, and each question is answered several times. The
common tokens are computed once per exam, the rest of a prompt once per question, and the rows that
answer it attend to both where they lie: nothing is copied per row. Everything that a batch of
questions generates is one device program, without a host call per token.

Letters: Q questions, R rows of a question (the greedy one first), B = Q R rows, L prompt tokens,
T generated tokens, V padded vocabulary, N layers, K key heads, H head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from distill_jax.student.losses import last_state
from distill_jax.student.model import ModelConfig, Params, Segment, forward, logits
from distill_jax.student.sampling import Sampling, draw, uniforms

BEGINS, ENDS, BLANK = 1, 2, 4
"""Bits of `Stops.newlines`: the text begins with a newline, ends with one, has a blank line."""


class Stops(NamedTuple):
    """What ends a completion: the end token, or a blank line."""

    end_id: Int[Array, ""]  # -1 where the tokenizer has none
    newlines: UInt8[Array, " W"]  # bits for each of the W ids that mean something


class Prompts(NamedTuple):
    """What a batch of questions asks, behind the common tokens."""

    tokens: Int[Array, "Q L"]
    mask: Bool[Array, "Q L"]  # True on real tokens; at least one, padding on the right
    limits: Int[Array, "Q R"]  # tokens that each row may generate; 0 fills the batch
    keys: UInt32[Array, "Q R 2"]  # randomness of each row, a function of its identity alone


class Answers(NamedTuple):
    """What came back."""

    tokens: Int[Array, "Q R T"]  # 0 behind the last one generated
    num_tokens: Int[Array, "Q R"]
    stopped: Bool[Array, "Q R"]  # ended by a stop rule, not by the limit


class Stage(NamedTuple):
    """A stretch of decoding with arrays of one size."""

    tokens: int  # generated once it is over; its cache holds as many
    rows: int  # of each question that may still be going


class _State(NamedTuple):
    answers: Answers
    token: Int[Array, "Q r"]  # the last one chosen, not fed yet
    step: Int[Array, ""]  # tokens chosen so far by every row that is still going
    cache: tuple[Float[Array, "N B K T H"], Float[Array, "N B K T H"]]  # keys, values


def plan_stages(*, greedy: int, sampled: int, samples: int, first: int = 32) -> tuple[Stage, ...]:
    """Cuts decoding into stages whose cache doubles, and drops the samples where they end.

    Attention reads the whole cache, written or not, so a cache as long as the longest completion
    would cost its full length from the first token on.

    Args:
      greedy: Tokens that the greedy row may generate, at least 1.
      sampled: Tokens that a sample may generate, at least 1.
      samples: Rows of a question besides the greedy one.
      first: Tokens of the first stage.

    Example:
      >>> [tuple(stage) for stage in plan_stages(greedy=150, sampled=70, samples=4)]
      [(32, 5), (64, 5), (70, 5), (150, 1)]
    """
    longest = max(greedy, sampled if samples else 0)
    ends = {longest} | ({sampled} if samples and sampled < longest else set())
    while first * 3 <= longest * 2:  # a last doubling by less than half is not worth compiling
        ends.add(first)
        first *= 2
    return tuple(Stage(end, 1 + samples if end <= sampled else 1) for end in sorted(ends))


def answer(
    config: ModelConfig,
    params: Params,
    shared: tuple[Segment, ...],
    prompts: Prompts,
    stops: Stops,
    *,
    stages: Sequence[Stage],
    sampling: Sampling,
    compute_dtype: DTypeLike,
) -> Answers:
    """Answers every question of a batch: row 0 greedily, the others at random.

    Args:
      config: What the student looks like.
      params: Its weights.
      shared: The segment of the tokens that all prompts begin with, or nothing.
      prompts: The rest of each prompt.
      stops: What ends a completion.
      stages: From `plan_stages`.
      sampling: How tokens are drawn.
      compute_dtype: Of matrix products and cache; logits and probabilities are float32.

    Returns:
      Completions as token ids. The token that ended one is its last.
    """
    run = partial(forward, config, params, compute_dtype=compute_dtype)
    start = sum((jnp.sum(segment.mask[0]) for segment in shared), jnp.zeros((), jnp.int32))
    begin = start + jnp.sum(prompts.mask, axis=1)
    places = _places(config, jnp.full(begin.shape, start), prompts.tokens.shape[1])
    hidden, question = run(prompts.tokens, places, prompts.mask, shared)

    def choose(hidden: Float[Array, "Q r D"], step: Array) -> Int[Array, "Q r"]:
        scores = logits(config, params, hidden)
        known = jnp.arange(scores.shape[-1]) < stops.newlines.shape[0]
        scores = jnp.where(known[None, None], scores, -jnp.inf)
        return _choose(scores, prompts.keys[:, : hidden.shape[1]], step, sampling)

    step = jnp.zeros((), jnp.int32)
    rows = prompts.limits.shape[1]
    token = choose(jnp.repeat(last_state(hidden, prompts.mask)[:, None], rows, axis=1), step)
    answers = _record(_blank(prompts, stages), token, token, step, prompts, stops)
    layers, _, heads, _, size = question.keys.shape
    empty = jnp.zeros((layers, token.size, heads, 0, size), question.keys.dtype)
    state = _State(answers, token, step + 1, (empty, empty))

    place = partial(_places, config)
    advance = partial(_advance, run, choose, place, (*shared, question), begin, prompts, stops)
    for stage in stages:
        state = _resize(state, stage)
        state = jax.lax.while_loop(partial(_unfinished, prompts, stage), advance, state)
    return state.answers


def _advance(
    run: Callable[..., tuple[Array, Segment]],
    choose: Callable[[Array, Array], Array],
    place: Callable[[Array, int], Array],
    past: tuple[Segment, ...],
    begin: Int[Array, " Q"],
    prompts: Prompts,
    stops: Stops,
    state: _State,
) -> _State:
    """Feeds every row its last token and chooses the next one."""
    count, fed = state.token.size, state.step - 1
    rows, columns = state.token.shape[1], state.cache[0].shape[3]
    origin = jnp.repeat(begin, rows)
    written = jnp.broadcast_to(jnp.arange(columns) < fed, (count, columns))
    hidden, own = run(
        state.token.reshape(count, 1),
        place(origin + fed, 1),
        jnp.ones((count, 1), bool),
        (*past, Segment(*state.cache, place(origin, columns), written)),
    )
    token = choose(hidden.reshape(-1, rows, hidden.shape[-1]), state.step)
    answers = _record(state.answers, state.token, token, state.step, prompts, stops)
    column = (0, 0, 0, fed, 0)
    keys = jax.lax.dynamic_update_slice(state.cache[0], own.keys, column)
    values = jax.lax.dynamic_update_slice(state.cache[1], own.values, column)
    return _State(answers, token, state.step + 1, (keys, values))


def _places(config: ModelConfig, first: Int[Array, " B"], length: int) -> Int[Array, "B L"]:
    """Consecutive positions; those of padding stay where a learned table can answer."""
    places = first[:, None] + jnp.arange(length)[None]
    return jnp.minimum(places, config.max_positions - 1)


def _blank(prompts: Prompts, stages: Sequence[Stage]) -> Answers:
    shape = prompts.limits.shape
    tokens = jnp.zeros((*shape, stages[-1].tokens), jnp.int32)
    return Answers(tokens, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def _going(answers: Answers, prompts: Prompts) -> Bool[Array, "Q R"]:
    return ~answers.stopped & (answers.num_tokens < prompts.limits)


def _unfinished(prompts: Prompts, stage: Stage, state: _State) -> Bool[Array, ""]:
    return (state.step < stage.tokens) & jnp.any(_going(state.answers, prompts))


def _resize(state: _State, stage: Stage) -> _State:
    """The state with the rows and the cache of `stage`."""
    questions, rows = state.token.shape

    def fit(cache: Float[Array, "N B K T H"]) -> Float[Array, "N b K t H"]:
        layers, _, heads, columns, size = cache.shape
        kept = cache.reshape(layers, questions, rows, heads, columns, size)[:, :, : stage.rows]
        flat = kept.reshape(layers, questions * stage.rows, heads, columns, size)
        return jnp.pad(flat, ((0, 0), (0, 0), (0, 0), (0, stage.tokens - columns), (0, 0)))

    keys, values = map(fit, state.cache)
    return state._replace(token=state.token[:, : stage.rows], cache=(keys, values))


def _record(
    answers: Answers,
    last: Int[Array, "Q r"],
    token: Int[Array, "Q r"],
    step: Int[Array, ""],
    prompts: Prompts,
    stops: Stops,
) -> Answers:
    """Writes down the token that each going row chose after `last`, and which rows it ended."""
    rows = token.shape[1]
    going = _going(answers, prompts)[:, :rows]
    now = stops.newlines[token]
    before = jnp.where(step > 0, stops.newlines[last], 0)
    blank = ((now & BLANK) > 0) | (((before & ENDS) > 0) & ((now & BEGINS) > 0))
    ended = going & (blank | (token == stops.end_id))
    written = jnp.where(going, token, 0)[:, :, None]
    return Answers(
        jax.lax.dynamic_update_slice(answers.tokens, written, (0, 0, step)),
        answers.num_tokens.at[:, :rows].add(going.astype(jnp.int32)),
        answers.stopped.at[:, :rows].set(answers.stopped[:, :rows] | ended),
    )


def _choose(
    scores: Float[Array, "Q r V"],
    keys: UInt32[Array, "Q r 2"],
    step: Int[Array, ""],
    sampling: Sampling,
) -> Int[Array, "Q r"]:
    """The likeliest token for row 0, a drawn one for each other row."""
    greedy = jnp.argmax(scores[:, :1], axis=-1)
    questions, drawn, vocabulary = scores[:, 1:].shape
    if not drawn:
        return greedy
    uniform = uniforms(keys[:, 1:].reshape(-1, 2), step)
    token = draw(scores[:, 1:].reshape(-1, vocabulary), uniform, sampling)
    return jnp.concatenate([greedy, token.reshape(questions, drawn)], axis=1)
