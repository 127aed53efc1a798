"""A batch as a tree of tokens, laid out flat, and the states of its tokens.

A training sample is demonstrations, question and rationale, and reflection adds one or two more
rationales behind the same question. The batch is that tree: the demonstrations once, each question
once, then the branches. In a causal model a shared stretch has one value, so losses and gradients
equal those of the flat sequences (dropout must be 0, and is).

All tokens stand in one line per device, one text after the other, and everything but attention is
computed on that line, so padding costs nothing there. Attention to the demonstrations is one
product for the whole line. Only attention within questions and branches goes over rectangles, which
tokens are copied into and back from.

Letters: M microbatches, S row shards of the mesh, T tokens of a shard's line, C the first of them,
P the first of those, N other tokens for one, B rows of a shard, J branches of a row, Q question
tokens, R branch tokens, X tokens of some rectangle, W tokens attended to, n heads, H head
dim, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill_jax.student.attention import Share, Stretch, add_up, merge, weigh
from distill_jax.student.model import ModelConfig, Params, softmax

NOWHERE = 2**30
"""Indices from here on point at nothing. No index occurs twice, these included."""

Runner = Callable[..., tuple[Array, Any]]
"""`student.model.run_blocks` with student, precision and layout bound."""

Rectangles = tuple[Int[Array, "M S B J R"], ...]
"""All branches of one kind; or the longest of every row, then the others, of which R is smaller.

Most are far shorter than the longest of all, and attention within them costs R squared."""


class Counts(NamedTuple):
    """What a batch holds, known before any state is computed."""

    predicted: Float[Array, ""]  # tokens of all flat sequences but the first of each: unweighted
    valid: Float[Array, ""]  # rows that reflection learns from
    real: Float[Array, ""]  # rows
    useful: Float[Array, ""]  # tokens on the lines, those of demonstrations once
    predictions: Float[Array, ""]  # of these, how many may predict something
    pairs: Float[Array, ""]  # a token and one that it sees, itself included
    read: Float[Array, ""]  # tokens of an encoder, which `useful` counts too
    read_pairs: Float[Array, ""]  # the encoder's, which `pairs` leaves out


class Batch(NamedTuple):
    """The rows of one step, as a tree; made by `packing.pack`.

    On the line of a shard stand its part of the demonstrations, all questions, the branches that
    may predict something, the other branches, and padding. Live branches begin with the last token
    of the prompt, as what follows it differs, cut ones behind it.
    """

    tokens: Int[Array, "M S T"]
    positions: Int[Array, "M S T"]  # in the flat sequence that a token belongs to
    targets: Int[Array, "M S C"]  # the token that follows
    weights: Float[Array, "M S C"]  # of that prediction in the language-modelling loss
    owners: Int[Array, "M S C"]  # 2 x row in the anchor, 2 x row + 1 in the negative, else NOWHERE
    shared: Bool[Array, "M S P"]  # True on demonstrations; False fills the last shards
    questions: Int[Array, "M S B Q"]  # where the tokens of prompts stand, but for the last
    live: Rectangles  # the same for branches whose gradient reaches the prompt
    cut: Rectangles  # and for those whose gradient ends there
    reaches: Bool[Array, "M S T"]  # False on the tokens of cut branches
    homes: Int[Array, "M S T"]  # where a token stands in (questions, live, cut) laid side by side
    ends: Int[Array, "M S B 3"]  # where the last tokens of anchor, positive and negative stand
    valid: Bool[Array, "M S B"]  # has all that reflection compares
    counts: Counts
    others: Int[Array, "M S C N"] | None = None  # what might stand in a target's place, if that
    shares: Float[Array, "M S C N"] | None = None  # is known, and its share of the prediction

    @property
    def computed(self) -> int:
        """Tokens, padding included."""
        return self.tokens.size


def tree_states(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    run: Runner,
    gather: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "S T D"]:
    """The states of all tokens of a microbatch, whose arrays have no axis M.

    Every text is seen as if it stood alone behind its prompt: a token sees the demonstrations up to
    its own position, its own question, and its own branch up to itself; in local layers only what
    is in its window.

    Args:
      config: What the student looks like.
      params: Its weights.
      batch: From `packing.pack`, one microbatch of it.
      run: `run_blocks`, bound.
      gather: Lays what every shard needs, the keys of the demonstrations, on every device.
    """

    def look(local: Array | None, _: Any, query: Array, key: Array, value: Array):
        window = None
        if local is not None and config.window is not None:
            window = jnp.where(local, config.window, NOWHERE)
        line = _Line(query, key, value, batch.positions, window, partial(weigh, **softmax(config)))
        question = line.copy(batch.questions)
        shares = [line.weigh(question, question)]
        shares += [line.weigh_both(line.copy(branch), question) for branch in batch.live]
        if batch.cut:
            last = batch.live[0][:, :, 0, :1]  # of the prompt
            asked = jnp.concatenate([batch.questions, last], axis=-1)
            prompt = jax.lax.stop_gradient(line.copy(asked))
            shares += [line.weigh_both(line.copy(branch), prompt) for branch in batch.cut]
        share = _bring_home(shares, batch.homes)
        if batch.shared.shape[1]:
            share = add_up(share, _weigh_shared(line, batch, gather))
        return merge([share], query), None

    return run(params, batch.tokens, batch.positions, look)[0]


class _Rows(NamedTuple):
    """Texts side by side, for attention only."""

    query: Float[Array, "X L heads H"]
    key: Float[Array, "X n W H"]
    value: Float[Array, "X n W H"]
    places: Int[Array, "X W"]  # positions in the flat sequences; NOWHERE on padding


class _Line(NamedTuple):
    """What one layer makes of the tokens on the line."""

    query: Float[Array, "S T heads H"]
    key: Float[Array, "S T n H"]
    value: Float[Array, "S T n H"]
    places: Int[Array, "S T"]
    window: Int[Array, ""] | None
    weigh_stretch: Callable[..., Share]

    def copy(self, index: Int[Array, "S *to"]) -> _Rows:
        """The tokens that `index` points at as rows, zeros where it points at nothing."""
        width = index.shape[-1]
        query, key, value = (
            _take(x, index, 0).reshape(-1, width, *x.shape[2:])
            for x in (self.query, self.key, self.value)
        )
        places = _take(self.places, index, NOWHERE).reshape(-1, width)
        return _Rows(query, key.swapaxes(1, 2), value.swapaxes(1, 2), places)

    def weigh(self, rows: _Rows, stretch: _Rows) -> Share:
        """What `stretch` adds to the softmax of `rows`, several of which may share one of it."""
        return self.weigh_all(rows.query, rows.places, stretch)

    def weigh_both(self, branch: _Rows, behind: _Rows) -> Share:
        """What the text before a branch and the branch itself add."""
        return add_up(self.weigh(branch, behind), self.weigh(branch, branch))

    def weigh_all(
        self, query: Array, places: Array, stretch: _Rows, reaches: Array | None = None
    ) -> Share:
        keys = jnp.repeat(stretch.places, places.shape[0] // stretch.places.shape[0], axis=0)
        visible = keys[:, None] <= places[:, :, None]
        if self.window is not None:
            visible &= places[:, :, None] - keys[:, None] < self.window
        return self.weigh_stretch(query, Stretch(stretch.key, stretch.value, visible), reaches)


def _take(x: Array, index: Int[Array, "S *to"], fill: float | int) -> Array:
    """Copies from the line of each shard, [S, T, ...] to [S, *X, ...]; `fill` for nothing."""

    def one(line: Array, where: Array) -> Array:
        return line.at[where].get(mode="fill", fill_value=fill, unique_indices=True)

    return jax.vmap(one)(x, index)


def _bring_home(shares: Sequence[Share], homes: Int[Array, "S T"]) -> Share:
    """What rectangles gave, back on the line; tokens that stand in none have seen nothing."""

    def bring(parts: tuple[Array, ...], fill: float | int) -> Array:
        flat = [x.reshape(homes.shape[0], -1, *x.shape[2:]) for x in parts]
        return _take(jnp.concatenate(flat, axis=1), homes, fill)

    tops, totals, mixed = zip(*shares, strict=True)
    lowest = float(jnp.finfo(jnp.float32).min)
    return Share(bring(tops, lowest), bring(totals, 0.0), bring(mixed, 0.0))


def _weigh_shared(line: _Line, batch: Batch, gather: Callable[[Array], Array]) -> Share:
    """What the demonstrations add for every token on the line: one product of two matrices."""
    length = batch.shared.shape[1]
    places = jnp.where(batch.shared, line.places[:, :length], NOWHERE)

    def join(x: Array) -> Array:  # [S, P, ...] to [1, S P, ...]
        return gather(x).reshape(1, -1, *x.shape[2:])

    key, value = (join(x[:, :length]).swapaxes(1, 2) for x in (line.key, line.value))
    everything = _Rows(line.query, key, value, join(places))
    reaches = batch.reaches if batch.cut else None
    return line.weigh_all(line.query, line.places, everything, reaches)
