"""The seating of an exam: which row sits in which slot, and which pages are whose.

Plain bookkeeping on the host. Every replica of the weights has a desk with as many slots as the
others. Prompts wait in one queue, in order of length, so that those read together need little
padding. A row that has ended leaves its slot to the next one; once nobody waits, slots become fewer
as soon as the rows left fit. Numbers of slots and sizes of pools are few, as each is a program to
compile.

Letters: D desks, B slots of all desks, A prompts that a desk reads together, L prompt tokens, W
pages of a row.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distill_jax.student.decode import NOWHERE, Chosen
from distill_jax.tokenizer import padded_length

PAGE = 32
"""Tokens of a page."""

CALL = 16
"""Tokens that a row chooses in one call at most."""

LEAST = 8
"""Slots of a desk come in multiples of this."""

FEWER = (2, 4, 16)
"""Once nobody waits, the slots of a desk are divided by these, one after the other."""


@dataclass(eq=False)
class Prompt:
    """A question that is asked."""

    index: int  # among the prompts given
    tokens: Sequence[int]  # behind the common ones; the last is fed by each row, others are read
    rows: list["Row"] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # of all tokens but the last

    @property
    def num_pages(self) -> int:
        """Pages that it needs."""
        return -(-(len(self.tokens) - 1) // PAGE)


@dataclass(eq=False)
class Row:
    """One answer to a prompt."""

    prompt: Prompt
    place: int  # 0 is greedy
    limit: int  # tokens, at least one
    key: np.ndarray
    chosen: list[int] = field(default_factory=list)
    stopped: bool = False
    pages: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether a stop rule or the limit has ended it."""
        return self.stopped or len(self.chosen) == self.limit

    @property
    def num_pages(self) -> int:
        """Pages that it needs for one more call."""
        return -(-min(len(self.chosen) + CALL, self.limit) // PAGE)


class Sizes(NamedTuple):
    """What each desk has."""

    slots: int
    prompt_pages: int
    own_pages: int


class Move(NamedTuple):
    """The pages of new pools, as numbers of the old ones; those that are free hold anything."""

    prompts: np.ndarray  # [D P]
    own: np.ndarray


class Reading(NamedTuple):
    """Prompts to be read together, A for each desk; those that only fill up have no tokens."""

    tokens: np.ndarray  # [D A, L]
    mask: np.ndarray
    pages: np.ndarray  # [D A, W]


@dataclass
class Tally:
    """What an exam computed, in tokens."""

    read: int = 0  # of prompts, behind the common ones; padding included
    chosen: int = 0
    computed: int = 0  # chosen, and what slots computed for nobody

    @property
    def occupancy(self) -> float:
        """The share of slots in use, over all tokens."""
        return self.chosen / self.computed


class _Desk:
    """The slots of one replica."""

    def __init__(self, sizes: Sizes):
        self.slots: list[Row | None] = [None] * sizes.slots
        self.waiting: deque[Row] = deque()
        self.prompts: list[Prompt] = []  # read, and not answered in full
        self.free_prompt_pages = list(range(sizes.prompt_pages))
        self.free_own_pages = list(range(sizes.own_pages))

    @property
    def live(self) -> list[Row]:
        return [row for row in self.slots if row]

    @property
    def ahead(self) -> int:
        """Rows that wait beyond those that could sit down at once."""
        return len(self.waiting) - self.slots.count(None)

    def seat(self) -> None:
        for slot, row in enumerate(self.slots):
            if row is None and self.waiting:
                self.slots[slot] = self.waiting.popleft()

    def hand_out(self) -> None:
        """Gives everybody the pages that they need."""
        for texts, free in (
            (self.prompts, self.free_prompt_pages),
            (self.live, self.free_own_pages),
        ):
            for text in texts:
                missing = text.num_pages - len(text.pages)
                if missing > 0:
                    text.pages += [free.pop() for _ in range(missing)]

    def leave(self, slot: int, row: Row) -> bool:
        """Frees the slot of a row that has ended; says if it was the last one of its prompt."""
        self.slots[slot] = None
        self.free_own_pages += row.pages
        last = all(other.ended for other in row.prompt.rows)
        if last:
            self.prompts.remove(row.prompt)
            self.free_prompt_pages += row.prompt.pages
        return last

    def move(self, sizes: Sizes) -> Move:
        """Numbers all pages from 0 on, and gives their old numbers."""
        rows = self.live
        self.slots = [*rows, *[None] * (sizes.slots - len(rows))]
        prompts, self.free_prompt_pages = _renumber(self.prompts, sizes.prompt_pages)
        own, self.free_own_pages = _renumber(rows, sizes.own_pages)
        return Move(prompts, own)


def _renumber(texts: Sequence[Prompt | Row], count: int) -> tuple[np.ndarray, list[int]]:
    """The old numbers of `count` pages, and the new ones that are free."""
    old, used = np.zeros(count, np.int32), 0
    for text in texts:
        new = list(range(used, used + len(text.pages)))
        old[new] = text.pages
        text.pages, used = new, used + len(new)
    return old, list(range(used, count))


class Seating:
    """Who sits where, from the first prompt to the last."""

    def __init__(self, prompts: Sequence[Prompt], *, owed: Collection[int], desks: int, slots: int):
        """Lets everybody wait.

        Args:
          prompts: All of the exam, each with the same number of rows: they decide on the widths of
            tables, which must not change with what is owed. May be made when they are asked for:
            the seating holds on only to those that are being answered.
          owed: Indices of those to be answered; at least one is.
          desks: Replicas of the weights.
          slots: Of each desk, a multiple of `LEAST`.
        """
        self._prompts, self._share = prompts, len(prompts[0].rows)
        facts = ((p.index, len(p.tokens), p.num_pages, _most(p.rows)) for p in prompts)
        index, length, self._pages, limit = np.fromiter(facts, np.dtype((np.int32, 4))).T
        ordered = np.lexsort((index, length, self._pages))
        owing = [number in owed for number in index.tolist()]  # of ints: a range finds them at once
        self._queue = deque(i for i in ordered.tolist() if owing[i])
        self._together = max(1, slots // (4 * self._share))
        # A prompt is held from before its rows sit down until the last of them has ended.
        longest = ordered[-(3 * slots // (2 * self._share) + self._together) :]
        num_pages = int(self._pages[longest].sum())
        self.sizes = Sizes(slots, padded_length(num_pages), _usual_pages(slots))
        self._fewer = [-(-slots // (parts * LEAST)) * LEAST for parts in FEWER]
        self._desks = [_Desk(self.sizes) for _ in range(desks)]
        self._most_pages = int(self._pages.max())
        self._own_width = -(-int(limit.max()) // PAGE)
        self.tally = Tally()

    @property
    def ended(self) -> bool:
        """Whether everybody has left."""
        return not self._queue and not any(desk.prompts for desk in self._desks)

    def read(self) -> tuple[Move | None, Reading] | None:
        """The next prompts to be read, once their pages are there; None if enough rows wait.

        All have one padded length, which depends on each of them alone: neighbours don't change
        how sums are rounded.
        """
        if not self._queue or all(desk.ahead >= 0 for desk in self._desks):
            return None
        width = self._next_width
        taken: list[list[Prompt]] = [[] for _ in self._desks]
        open_ = [d.ahead < self._together * self._share for d in self._desks]
        for place in np.tile(np.flatnonzero(open_), self._together):
            if self._queue and self._next_width == width:
                taken[place].append(self._prompts[self._queue.popleft()])
        for desk, prompts in zip(self._desks, taken, strict=True):
            desk.prompts += prompts
            desk.waiting.extend(row for prompt in prompts for row in prompt.rows)
        move = self._fit(self.sizes.slots)
        return move, self._reading(taken, width)

    def seat(self) -> tuple[Move | None, list[np.ndarray], np.ndarray]:
        """Who chooses tokens in the next call.

        Returns:
          How pages have to be moved before; the rows, as the fields of `decode.Rows`; and for each
          desk how many have to end for the call to return early.
        """
        for desk in self._desks:
            desk.seat()
        slots = self.sizes.slots
        if not self._waits:
            slots = min([size for size in self._fewer if self._most_live <= size] + [slots])
        move = self._fit(slots)
        for desk in self._desks:
            desk.hand_out()
        enough = np.array([self._enough(desk) for desk in self._desks], np.int32)
        return move, self._rows(), enough

    def take(self, chosen: Chosen) -> Iterator[Prompt]:
        """Notes what a call chose, frees the slots of rows that ended, and gives full prompts."""
        counts = np.split(chosen.count, len(self._desks))
        self.tally.chosen += int(chosen.count.sum())
        self.tally.computed += sum(int(count.max()) * len(count) for count in counts)
        for number, desk in enumerate(self._desks):
            for slot, row in enumerate(desk.slots):
                if row is None:
                    continue
                place = number * len(desk.slots) + slot
                row.chosen += chosen.tokens[place, : chosen.count[place]].tolist()
                row.stopped = bool(chosen.stopped[place])
                if row.ended and desk.leave(slot, row):
                    yield row.prompt

    @property
    def _next_width(self) -> int:
        return _doubled(int(self._pages[self._queue[0]]))

    @property
    def _waits(self) -> bool:
        return bool(self._queue) or any(desk.waiting for desk in self._desks)

    @property
    def _most_live(self) -> int:
        return max(len(desk.live) for desk in self._desks)

    def _enough(self, desk: _Desk) -> int:
        """Rows of a desk that have to end for a call to return before its last token."""
        slots = self.sizes.slots
        if self._queue or desk.waiting:
            return max(1, slots // 16)
        spare = len(desk.live) - max([size for size in self._fewer if size < slots], default=0)
        return spare if spare > 0 else CALL * slots

    def _fit(self, slots: int) -> Move | None:
        """Makes pools large enough for all prompts and rows, and small again with the slots."""
        prompts = max(sum(p.num_pages for p in desk.prompts) for desk in self._desks)
        own = max(sum(row.num_pages for row in desk.live) for desk in self._desks)
        _, had_prompts, had_own = self.sizes
        if slots < self.sizes.slots:  # no more prompts than rows are left, and they are the longest
            had_prompts = min(had_prompts, padded_length(slots * self._most_pages))
            had_own = _usual_pages(slots)
        sizes = Sizes(
            slots,
            had_prompts if prompts <= had_prompts else padded_length(prompts),
            had_own if own <= had_own else padded_length(own),
        )
        if sizes == self.sizes:
            return None
        self.sizes = sizes
        moves = [desk.move(sizes) for desk in self._desks]
        return Move(*(np.concatenate(part) for part in zip(*moves, strict=True)))

    def _reading(self, taken: Sequence[Sequence[Prompt]], width: int) -> Reading:
        shape = (len(taken) * self._together, width)
        tokens = np.zeros((shape[0], width * PAGE), np.int32)
        lengths, pages = np.zeros(shape[0], np.int32), np.full(shape, NOWHERE, np.int32)
        for number, (desk, prompts) in enumerate(zip(self._desks, taken, strict=True)):
            desk.hand_out()
            for place, prompt in enumerate(prompts, number * self._together):
                lengths[place] = len(prompt.tokens) - 1
                tokens[place, : lengths[place]] = prompt.tokens[:-1]
                pages[place, : len(prompt.pages)] = prompt.pages
        self.tally.read += tokens.size
        return Reading(tokens, np.arange(width * PAGE)[None] < lengths[:, None], pages)

    def _rows(self) -> list[np.ndarray]:
        slots = [row for desk in self._desks for row in desk.slots]
        token, fed, limit, place, prompt = np.zeros((5, len(slots)), np.int32)
        keys = np.zeros((len(slots), 2), np.uint32)
        prompt_pages = np.full((len(slots), _doubled(self._most_pages)), NOWHERE, np.int32)
        own_pages = np.full((len(slots), self._own_width), NOWHERE, np.int32)
        for slot, row in enumerate(slots):
            if row is not None:
                text = row.prompt
                token[slot] = row.chosen[-1] if row.chosen else text.tokens[-1]
                fed[slot], limit[slot], keys[slot] = len(row.chosen), row.limit, row.key
                place[slot], prompt[slot] = row.place, len(text.tokens) - 1
                prompt_pages[slot, : len(text.pages)] = text.pages
                own_pages[slot, : len(row.pages)] = row.pages
        return [token, fed, limit, keys, place, prompt, prompt_pages, own_pages]


def _most(rows: Sequence[Row]) -> int:
    return max(row.limit for row in rows)


def _usual_pages(slots: int) -> int:
    """Pages that so many rows use when some are young and some are old, with some to spare."""
    return slots * 21 // 8


def _doubled(pages: int) -> int:
    """As many pages, or up to the next power of two: prompts are read in few widths."""
    return 1 << (max(pages, 1) - 1).bit_length()
