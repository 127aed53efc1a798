"""The device programs of an exam: what they hold, what replicas say to each other, what fits."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from random_models import make_params, make_rows, variant

from distill_jax import generate
from distill_jax.engine import Engine, exam_mesh
from distill_jax.generate import free_memory, plan_slots, slot_bytes
from distill_jax.slots import Prompt, Row, Seating
from distill_jax.student.architecture import ModelConfig
from distill_jax.student.decode import Pools
from distill_jax.student.decode import Rows as DeviceRows
from distill_jax.student.model import forward, logits
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import make_mesh

CONFIG = ModelConfig(
    vocab_size=16384, width=64, layers=3, heads=4, kv_heads=4, head_dim=16, mlp_width=128,
    max_positions=1024,
)  # fmt: skip
SHARED, QUESTION, LIMIT = 300, 120, 128


def make_engine(
    sampling: Sampling, *sizes: int, config: ModelConfig = CONFIG, dtype: str = "float32"
) -> Engine:
    return Engine(
        config,
        make_mesh(*sizes),
        end_id=-1,
        newlines=np.zeros(config.vocab_size, np.uint8),
        sampling=sampling,
        compute_dtype=dtype,
    )


def make_prompts(count: int = 64, rows: int = 4, length: int = QUESTION) -> list[Prompt]:
    prompts = [Prompt(index, [7] * length) for index in range(count)]
    for prompt in prompts:
        key = np.zeros(2, np.uint32)
        prompt.rows = [Row(prompt, place, LIMIT, key) for place in range(rows)]
    return prompts


class Programs(NamedTuple):
    """What an exam begins with, and its two large programs."""

    pools: Pools
    read: Any
    advance: Any


def compile_programs(engine: Engine, slots: int) -> Programs:
    seating = Seating(make_prompts(), owed=range(64), desks=engine.desks, slots=slots)
    weights = engine.lay_out(make_params(CONFIG, mesh=engine.mesh))
    shared = engine.read_shared(weights, [5] * SHARED)
    step = seating.read()
    assert step is not None
    rows: list[Any]
    _, rows, enough = seating.seat()
    pools = engine.make_pools(seating.sizes)
    read = engine._read_prompts.lower(weights, shared, pools.prompts, list(step[1]))
    arrays = (*pools, DeviceRows(*rows), enough, engine._stops)
    advance = engine._advance.lower(weights, shared, *arrays, share=4)
    return Programs(pools, read.compile(), advance.compile())


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("sampling", "copies"),
    [(Sampling(top_k=50), 2), (Sampling(top_p=0.9), 5)],
    ids=["top-k", "top-p"],
)
def test_programs_hold_few_scores_and_no_second_pool(sampling, copies):
    """Two arrays [slots, vocabulary] of float32 where k is small; with top-p chances and order too.

    A question's pages for every row, in one layer, or a second pool would be as large as one.
    """
    slots = 64
    pools, read, advance = compile_programs(make_engine(sampling, 1, 1, 1), slots)
    scores = slots * CONFIG.padded_vocab * 4
    assert min(num_bytes(pages) for pages in pools) > scores
    held = advance.memory_analysis()
    assert held.alias_size_in_bytes == num_bytes(pools.own)
    assert held.temp_size_in_bytes < (copies + 1 / 8) * scores
    held = read.memory_analysis()
    assert held.alias_size_in_bytes == num_bytes(pools.prompts)
    seen = 4 * CONFIG.heads * 128 * (384 + 128) * 4  # scores of four prompts, padded, in a layer
    assert held.temp_size_in_bytes < 2.5 * seen


@pytest.mark.parametrize("name", ["gptj", "qwen3"])
def test_an_exam_in_half_precision_scores_as_training_does(name):
    config = variant(name)
    engine = make_engine(Sampling(), 1, 1, 1, config=config, dtype="bfloat16")
    params, rows = make_params(config), make_rows([7, 4], vocab_size=config.vocab_size)

    @jax.jit
    def sit(weights, rows):
        return engine._score(weights, engine._forward(weights)(*rows)[0])

    @jax.jit
    def train(params, rows):
        hidden, _ = forward(config, params, *rows, compute_dtype="bfloat16", unroll=True)
        return logits(config, params, hidden)

    np.testing.assert_array_equal(sit(engine.lay_out(params), rows), train(params, rows))


def test_a_head_of_its_own_lies_there_once():
    params = make_params(CONFIG)
    weights = make_engine(Sampling(), 1, 1, 1).lay_out(params)
    assert "head" in params and num_bytes(weights) == num_bytes(params)


COLLECTIVE = re.compile(
    r" = (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)


def collectives(program: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Shapes and kinds of what is exchanged for every token, and of all."""
    text = program.as_text()
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    each, every = [], []
    for part in re.split(r"\n\n", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+) \(", part)
        found = COLLECTIVE.findall(part)
        every += found
        each += found if name and name[1] in bodies else []
    return each, every


def test_replicas_are_silent_until_a_call_ends():
    _, read, advance = compile_programs(make_engine(Sampling(top_k=50), 2, 2, 1), 16)
    assert collectives(read) == ([], [])
    each, every = collectives(advance)
    assert each == []
    assert len(every) == 3  # what was chosen, for all hosts


def test_a_tensor_axis_exchanges_sums_of_states_and_no_pages():
    _, _, advance = compile_programs(make_engine(Sampling(top_k=50), 2, 1, 2), 16)
    each, every = collectives(advance)
    sums = [shape for shape, kind in each if kind == "all-reduce"]
    states = [shape for shape in sums if shape.startswith(("f32[16,64]", "f32[16,1,64]"))]
    assert len(states) == 2 * CONFIG.layers + 1  # of attention and MLP, and the embedding
    assert len(sums) == len(states) + 1  # the tops of piles
    gathered = [shape for shape, kind in each if kind != "all-reduce"]
    assert [shape.split("{")[0] for shape in gathered] == ["f32[16,1600]"]  # candidates of top-k
    assert len(every) == len(each) + 3


def test_slots_fill_the_memory_that_is_free():
    engine, prompts = make_engine(Sampling(), 1, 1, 1), make_prompts()
    token = 2 * 3 * 4 * 16 * 4  # keys and values of layers x heads x dims x bytes
    each = (LIMIT + 64 + (QUESTION + 32) * 3 // 4) * token + 4 * 4 * CONFIG.padded_vocab
    assert slot_bytes(engine, prompts) == each

    def plan(free: int | None, asked: int = 0, num_owed: int = 10**6) -> int:
        return plan_slots(engine, prompts, asked=asked, num_owed=num_owed, free=free)

    assert [plan(each * n) for n in (0, 5, 40, 100, 400)] == [8, 8, 32, 96, 384]
    assert plan(each * 100 - 1) == plan(each * 96) == 96  # a little less changes no program
    assert plan(10**12) == 512
    assert plan(None) == 128
    assert plan(each * 100, num_owed=50) == 56
    assert plan(each, asked=20) == 24


def test_the_fullest_device_decides_what_is_free(monkeypatch):
    mesh = make_mesh(1, 1, 1)
    assert free_memory(mesh) is None  # CPUs don't tell
    monkeypatch.setattr(generate, "_memory", lambda mesh: [(1000, 100), (1000, 300)])
    assert free_memory(mesh) == 630


def test_what_is_planned_holds_the_pools_and_the_scores():
    engine, prompts = make_engine(Sampling(), 1, 1, 1), make_prompts(200, 5)
    seating = Seating(prompts, owed=range(200), desks=1, slots=96)
    held = num_bytes(engine.make_pools(seating.sizes)) + 4 * 4 * 96 * CONFIG.padded_vocab
    assert 0.5 * held < 96 * slot_bytes(engine, prompts) < 2 * held
    assert held < 96 * slot_bytes(engine, prompts)


def test_a_tensor_axis_halves_what_a_slot_needs_where_it_divides_the_heads():
    prompts = make_prompts()
    one, two, eight = (
        slot_bytes(make_engine(Sampling(), 1, 1, tensor), prompts) for tensor in (1, 2, 8)
    )
    scores = 4 * 4 * CONFIG.padded_vocab
    assert (one - scores) == 2 * (two - scores)
    assert eight == one  # four heads lie whole on every device


def test_weights_lie_on_as_few_devices_as_leave_room_for_pages():
    mesh = make_mesh(2, 2, 2)
    for memory, tensor in ((None, 1), (200, 1), (199, 2), (99, 4), (30, 8), (1, 8)):
        found = exam_mesh(mesh, 100, memory)
        assert dict(found.shape) == {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
        assert list(found.devices.flat) == list(mesh.devices.flat)
