"""Prompt ids to completion ids on the device: read once, fork, decode, in a fixed number of slots.

All prompts of an exam begin with the same tokens, and each question is answered by several rows.
The common tokens are computed once per exam and the rest of a prompt once per question. A row sits
in a slot and attends to both, and to its own tokens, where they lie: keys and values lie in pages,
each row knows which pages are its own and its question's, and nothing is copied per row. Of an
encoder-decoder nothing is common: the encoder reads the whole prompt, and rows begin with a start
token.

A row's numbers depend on its own tokens alone, not on its slot, its neighbours or which pages it
was given: parts of a softmax are joined in the order of the row's own pages, and pages that a row
does not have weigh exactly nothing. On CPUs in float32 they are the same bit for bit.

Letters: B slots, A prompts read together, L prompt tokens, P pages, C tokens of a page, W pages of
a row, S rows of a question, T tokens chosen in one call, V padded vocabulary, N layers, K key
heads, H head dim, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from distill_jax.student.attention import Route, Turned
from distill_jax.student.model import Segment
from distill_jax.student.sampling import Sampling, choose

BEGINS, ENDS, BLANK = 1, 2, 4
"""Bits of `Stops.newlines`: the text begins with a newline, ends with one, has a blank line."""

NOWHERE = 2**30
"""The number of a page that is not there."""

Forward = Callable[..., tuple[Float[Array, "B L D"], Segment]]
"""`student.model.forward` with all but tokens, positions, mask and past bound."""


class Stops(NamedTuple):
    """What ends a completion: the end token, or a blank line."""

    end_id: Int[Array, ""]  # -1 where the tokenizer has none
    newlines: UInt8[Array, " V"]  # bits for each id that means something


class Pages(NamedTuple):
    """Keys and values of many texts, each layer an array of its own.

    Stacked over layers they would have to be copied out of the stack for every product, and keys
    with their dims last would have to be transposed.
    """

    keys: tuple[Float[Array, "P K H C"], ...]
    values: tuple[Float[Array, "P K C H"], ...]


class Context(NamedTuple):
    """A `Segment` whose layers lie apart."""

    pages: Pages
    positions: Int[Array, "P C"]
    mask: Bool[Array, "P C"]
    route: Route | None = None

    def stack(self) -> Segment:
        """The segment. To be called where it is used, in a loop's body, not before the loop.

        Then the stacks are never made: the layers are written out, and each takes its own part.
        """
        keys, values = map(jnp.stack, self.pages)
        return Segment(Turned(keys), values, self.positions, self.mask, self.route)


class Pools(NamedTuple):
    """What rows attend to besides the common tokens."""

    prompts: Pages  # each page of a question is read by all its rows
    own: Pages  # each by the row that wrote it


class Rows(NamedTuple):
    """What sits in the slots. A free slot has limit 0."""

    token: Int[Array, " B"]  # to be fed next: the last of the prompt, or the last one chosen
    fed: Int[Array, " B"]  # own tokens fed so far, from the last of the prompt on
    limit: Int[Array, " B"]  # tokens that the row may choose in all
    keys: UInt32[Array, "B 2"]  # its randomness, a function of its identity alone
    place: Int[Array, " B"]  # which of its question's rows it is; 0 is greedy
    prompt: Int[Array, " B"]  # tokens of its prompt between the common ones and the last
    prompt_pages: Int[Array, "B W"]  # where these lie, in order; `NOWHERE` behind the last
    own_pages: Int[Array, "B W"]  # room for its own tokens, in order; `NOWHERE` behind the last


class Chosen(NamedTuple):
    """What a call added to each row."""

    tokens: Int[Array, "B T"]  # 0 behind the last one
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]  # ended by a stop rule, not by the limit


class _State(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, " B"]
    chosen: Chosen
    own: Pages


def make_pages(
    count: int, size: int, *, heads: int, head_dim: int, layers: int, dtype: DTypeLike
) -> Pages:
    """`count` empty pages of `size` tokens."""
    shapes = ((count, heads, head_dim, size), (count, heads, size, head_dim))
    return Pages(*(tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for shape in shapes))


def move_pages(pages: Float[Array, "P K x y"], old: Int[Array, " p"]) -> Float[Array, "p K x y"]:
    """One layer's keys or values on new pages, which hold what the `old` ones did."""
    return pages[old]


def read_shared(
    forward: Forward, tokens: Int[Array, "1 L"], mask: Bool[Array, "1 L"], last_position: int
) -> Context:
    """What all prompts begin with, as a context of one page."""
    places = jnp.minimum(jnp.arange(tokens.shape[1]), last_position)[None]
    _, segment = forward(tokens, places, mask)
    keys = _keys(segment).swapaxes(-1, -2)
    return Context(Pages(tuple(keys), tuple(segment.values)), places, mask)


def read_prompts(
    forward: Forward,
    shared: tuple[Context, ...],
    pages: Pages,
    tokens: Int[Array, "A L"],
    mask: Bool[Array, "A L"],
    chosen: Int[Array, "A W"],
    last_position: int,
) -> Pages:
    """Reads prompts behind the common tokens and writes what rows attend to into pages.

    Args:
      forward: The student.
      shared: From `read_shared`, or nothing.
      pages: Those of all prompts.
      tokens: The prompts without common tokens and without their last; L is W pages.
      mask: True where a real token stands; padding on the right.
      chosen: Where each prompt's pages go; `NOWHERE` drops them.
      last_position: That the student knows.
    """
    start = jnp.broadcast_to(_length(shared), tokens.shape[:1])
    places = _places(start, tokens.shape[1], last_position)
    _, segment = forward(tokens, places, mask, [context.stack() for context in shared])

    def cut(x: Float[Array, "N A K L H"]) -> Float[Array, "N A W K C H"]:
        layers, rows, heads, _, size = x.shape
        return x.reshape(layers, rows, heads, chosen.shape[1], -1, size).swapaxes(2, 3)

    new = Pages(tuple(cut(_keys(segment)).swapaxes(-1, -2)), tuple(cut(segment.values)))
    return jax.tree.map(lambda x, y: x.at[chosen].set(y, mode="drop"), pages, new)


def advance(
    forward: Forward,
    score: Callable[[Float[Array, "B D"]], Float[Array, "B V"]],
    shared: tuple[Context, ...],
    pools: Pools,
    rows: Rows,
    stops: Stops,
    enough: Int[Array, ""],
    *,
    tokens: int,
    share: int,
    sampling: Sampling,
    last_position: int,
) -> tuple[Pages, Chosen]:
    """Lets every row choose its next tokens.

    Args:
      forward: The student.
      score: Its logits of the token that follows a state, in float32.
      shared: From `read_shared`, or nothing.
      pools: Pages of prompts and of rows.
      rows: What sits in the slots. Rows have pages for all that they may choose in this call.
      stops: What ends a completion.
      enough: Returns early once so many rows have ended, so that others can take their slots.
      tokens: T, that a row chooses at most.
      share: S, rows of a question.
      sampling: How rows other than the greedy ones choose.
      last_position: That the student knows.

    Returns:
      The rows' pages with what was fed, and what was chosen. The token that ended a row is its
      last.
    """
    common = _length(shared)
    start = common + rows.prompt
    asks = _look_up(pools.prompts, rows.prompt_pages, rows.place, share)
    prompts = _find(pools.prompts, asks, rows.prompt, jnp.broadcast_to(common, start.shape))
    owns = _look_up(pools.own, rows.own_pages, jnp.zeros_like(rows.place), 1)
    none = _none_chosen(rows, tokens)
    begun = _going(rows, none)

    def unfinished(state: _State) -> Bool[Array, ""]:
        going = _going(rows, state.chosen)
        return (state.step < tokens) & jnp.any(going) & (jnp.sum(begun & ~going) < enough)

    def feed(state: _State) -> _State:
        fed = rows.fed + state.chosen.count
        places = _places(start + fed, 1, last_position)
        past = (*shared, prompts, _find(state.own, owns, fed, start))
        hidden, new = forward(
            state.token[:, None], places, jnp.ones(places.shape, bool), [x.stack() for x in past]
        )
        scores = score(hidden[:, 0])
        known = jnp.arange(scores.shape[-1]) < stops.newlines.shape[0]
        scores = jnp.where(known[None], scores, -jnp.inf)
        greedy = None if share == 1 else rows.place == 0
        token = choose(scores, rows.keys, fed, greedy, sampling)
        # What was fed is written once the token is known: else pages are copied, for all that the
        # compiler sees, as they might be written before they are read.
        going = _going(rows, state.chosen) & (token >= 0)
        own = _write(state.own, new, rows.own_pages, fed, going)
        return _State(state.step + 1, token, _record(state, token, rows, stops), own)

    state = _State(jnp.zeros((), jnp.int32), rows.token, none, pools.own)
    state = jax.lax.while_loop(unfinished, feed, state)
    return state.own, state.chosen


class _Lookup(NamedTuple):
    """The pages of a pool, as told by the rows that have them."""

    route: Route
    owner: Int[Array, " P"]  # a row that has the page; any row where none does
    first: Int[Array, " P"]  # which of its text's tokens is the page's first


def _look_up(
    pages: Pages, table: Int[Array, "B W"], place: Int[Array, " B"], share: int
) -> _Lookup:
    count, _, size, _ = pages.values[0].shape
    rows, width = table.shape
    places = jnp.where(table < count, table * share + place[:, None], count * share)
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], table.shape)
    tokens = jnp.broadcast_to(jnp.arange(width)[None] * size, table.shape)
    asking = jnp.zeros(count * share, jnp.int32).at[places].set(row, mode="drop")
    owner = jnp.zeros(count, jnp.int32).at[table].set(row, mode="drop")
    first = jnp.full(count, NOWHERE, jnp.int32).at[table].set(tokens, mode="drop")
    return _Lookup(Route(asking.reshape(count, share), places), owner, first)


def _find(
    pages: Pages, lookup: _Lookup, length: Int[Array, " B"], start: Int[Array, " B"]
) -> Context:
    """Pages as context: of each row's text, `length` tokens from position `start` on."""
    index = lookup.first[:, None] + jnp.arange(_page_size(pages))[None]
    mask = index < length[lookup.owner][:, None]
    places = jnp.where(mask, start[lookup.owner][:, None] + index, 0)
    return Context(pages, places, mask, lookup.route)


def _write(
    pages: Pages,
    new: Segment,
    table: Int[Array, "B W"],
    fed: Int[Array, " B"],
    going: Bool[Array, " B"],
) -> Pages:
    """Each going row's newest token at its place among the row's own."""
    size = _page_size(pages)
    page = jnp.take_along_axis(table, (fed // size)[:, None], axis=1, mode="clip")[:, 0]
    page, place = jnp.where(going, page, NOWHERE), fed % size
    keys, values = _keys(new)[:, :, :, 0], new.values[:, :, :, 0]
    return Pages(
        tuple(
            x.at[page, :, :, place].set(y, mode="drop")
            for x, y in zip(pages.keys, keys, strict=True)
        ),
        tuple(
            x.at[page, :, place].set(y, mode="drop")
            for x, y in zip(pages.values, values, strict=True)
        ),
    )


def _keys(segment: Segment) -> Float[Array, "N B K L H"]:
    assert not isinstance(segment.keys, Turned), "forward gives keys as they come"
    return segment.keys


def _page_size(pages: Pages) -> int:
    return pages.values[0].shape[2]


def _length(shared: tuple[Context, ...]) -> Int[Array, ""]:
    return sum((jnp.sum(context.mask[0]) for context in shared), jnp.zeros((), jnp.int32))


def _places(first: Int[Array, " B"], length: int, last_position: int) -> Int[Array, "B L"]:
    """Consecutive positions; those of padding stay where a learned table can answer."""
    return jnp.minimum(first[:, None] + jnp.arange(length)[None], last_position)


def _none_chosen(rows: Rows, tokens: int) -> Chosen:
    count = rows.token.shape[0]
    blank = jnp.zeros((count, tokens), jnp.int32)
    return Chosen(blank, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))


def _going(rows: Rows, chosen: Chosen) -> Bool[Array, " B"]:
    return ~chosen.stopped & (rows.fed + chosen.count < rows.limit)


def _record(state: _State, token: Int[Array, " B"], rows: Rows, stops: Stops) -> Chosen:
    """Writes down the token that each going row chose, and which rows it ended."""
    chosen = state.chosen
    going = _going(rows, chosen)
    now = stops.newlines[token]
    # The last token of a prompt says nothing about where its completion's lines are blank.
    before = jnp.where(rows.fed + chosen.count > 0, stops.newlines[state.token], 0)
    blank = ((now & BLANK) > 0) | (((before & ENDS) > 0) & ((now & BEGINS) > 0))
    written = jnp.where(going, token, 0)[:, None]
    return Chosen(
        jax.lax.dynamic_update_slice(chosen.tokens, written, (0, state.step)),
        chosen.count + going,
        chosen.stopped | (going & (blank | (token == stops.end_id))),
    )
