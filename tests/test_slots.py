"""The seating of an exam, with numpy in the device's place."""

from typing import Any

import numpy as np
import pytest

from distill_jax.slots import CALL, LEAST, PAGE, Prompt, Row, Seating
from distill_jax.student.decode import NOWHERE, Chosen, Rows


def make_prompts(count: int, rows: int, seed: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    prompts = [
        Prompt(i, [10 * i] * length)
        for i, length in enumerate(np.clip(rng.lognormal(4.0, 0.5, count), 1, 300).astype(int))
    ]
    for prompt in prompts:
        limits = np.clip(rng.lognormal(4.2, 0.4, rows), 1, 200).astype(int)
        prompt.rows = [
            Row(prompt, place, int(limit), np.array([prompt.index, place], np.uint32))
            for place, limit in enumerate(limits)
        ]
    return prompts


class Device:
    """Keeps for every page whose tokens it holds, and checks that rows find their own there."""

    def __init__(self, seating: Seating, desks: int):
        self.prompts = np.full((desks, seating.sizes.prompt_pages), -1)
        self.own = np.full((desks, seating.sizes.own_pages), -1)

    def move(self, move, desks: int) -> None:
        if move is not None:
            kept = np.arange(desks)[:, None]
            self.prompts = self.prompts[kept, move.prompts.reshape(desks, -1)]
            self.own = self.own[kept, move.own.reshape(desks, -1)]

    def read(self, reading, desks: int) -> None:
        rows = zip(reading.tokens, reading.mask, reading.pages, strict=True)
        each = len(reading.tokens) // desks
        for place, (tokens, mask, pages) in enumerate(rows):
            for number, page in enumerate(pages[pages < NOWHERE]):
                assert mask[number * PAGE]
                self.prompts[place // each, page] = tokens[0]

    def advance(self, fields, enough, desks: int, rng: np.random.Generator) -> Chosen:
        rows = Rows(*fields)
        each = len(rows.token) // desks
        count = np.zeros(len(rows.token), np.int32)
        for desk in range(desks):
            mine = slice(desk * each, (desk + 1) * each)
            used = rows.own_pages[mine][rows.own_pages[mine] < NOWHERE]
            assert len(set(used)) == len(used), "two rows write into one page"
            begun = rows.limit[mine] > 0
            left = np.where(begun, rows.limit[mine] - rows.fed[mine], 0)
            ends = np.sort(left[begun])
            early = ends[enough[desk] - 1] if enough[desk] <= len(ends) else CALL
            steps = min(CALL, early, ends[-1]) if len(ends) else 0
            count[mine] = np.minimum(left, steps)
        for slot in np.flatnonzero(rows.limit):
            desk, name = slot // each, rows.keys[slot]
            pages = rows.prompt_pages[slot][rows.prompt_pages[slot] < NOWHERE]
            assert len(pages) == -(-rows.prompt[slot] // PAGE)
            assert (self.prompts[desk, pages] == 10 * name[0]).all()
            own = rows.own_pages[slot][rows.own_pages[slot] < NOWHERE]
            assert len(own) * PAGE >= rows.fed[slot] + count[slot]
            who, written = 100 * name[0] + name[1], -(-rows.fed[slot] // PAGE)
            assert (self.own[desk, own[:written]] == who).all()
            self.own[desk, own] = who
        arrays: Any = (rng.integers(0, 9, (len(count), CALL)), count, np.zeros(len(count), bool))
        return Chosen(*arrays)


@pytest.mark.parametrize("seed", range(12))
def test_everybody_is_answered_once_on_pages_of_their_own(seed):
    rng = np.random.default_rng(100 + seed)
    count, share, desks = int(rng.integers(1, 60)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    prompts = make_prompts(count, share, seed)
    owed = set(rng.permutation(count)[: int(rng.integers(1, count + 1))].tolist())
    seating = Seating(prompts, owed=owed, desks=desks, slots=int(rng.integers(1, 6)) * LEAST)
    device, answered = Device(seating, desks), []
    while not seating.ended:
        while (step := seating.read()) is not None:
            device.move(step[0], desks)
            device.read(step[1], desks)
        move, fields, enough = seating.seat()
        device.move(move, desks)
        answered += seating.take(device.advance(fields, enough, desks, rng))
    assert sorted(prompt.index for prompt in answered) == sorted(owed)
    for prompt in answered:
        assert all(len(row.chosen) == row.limit for row in prompt.rows)
    assert seating.tally.chosen == sum(row.limit for p in answered for row in p.rows)


@pytest.mark.parametrize(
    ("count", "slots", "least"), [(64, 128, 0.9), (64, 64, 0.93), (600, 128, 0.96)]
)
def test_slots_are_seldom_empty(count, slots, least):
    prompts = make_prompts(count, 4, 0)
    rng = np.random.default_rng(1)
    for prompt in prompts:
        for row in prompt.rows:
            row.limit = int(np.clip(rng.lognormal(np.log(76) - 0.05, 0.317), 8, 198))
    seating = Seating(prompts, owed=range(count), desks=1, slots=slots)
    device = Device(seating, 1)
    while not seating.ended:
        while (step := seating.read()) is not None:
            device.move(step[0], 1)
            device.read(step[1], 1)
        move, fields, enough = seating.seat()
        device.move(move, 1)
        for _ in seating.take(device.advance(fields, enough, 1, rng)):
            pass
    assert seating.tally.occupancy > least
