"""Completions: against transformers, and the same whatever the batch, the order or the devices."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from random_models import make_published, whole
from transformers import PreTrainedTokenizerFast

from distill_jax.config import ExamConfig
from distill_jax.engine import Engine, exam_mesh
from distill_jax.generate import Generate, make_generate, row_keys, sit
from distill_jax.records import Completion
from distill_jax.slots import Prompt, Row
from distill_jax.student.model import (
    ModelConfig,
    Params,
    abstract_params,
    init_params,
    logical_axes,
)
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
from distill_jax.tokenizer import Tokenizer, load_tokenizer
from distill_jax.weights import load_params, read_model_config

CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz:.?+"
TINY = ModelConfig(
    vocab_size=len(CHARACTERS) + 1, width=32, layers=2, heads=4, kv_heads=2, head_dim=8,
    mlp_width=48, max_positions=80,
)  # fmt: skip
EXAM = ExamConfig(samples=2, top_k=20, max_new_tokens=(12, 12), slots=16)
PROMPTS = [
    f"solve this sum for me: {text}" for text in
    ("1+2", "what is 30+41?", "a", "tom has 4 hats.", "9+9+9+9+9+9?", "go", "how many: 3+3")
]  # fmt: skip
IDS = [f"sums/train/{index}" for index in range(len(PROMPTS))]

Results = dict[str, tuple[Completion, ...]]


def publish_characters(directory: Path) -> None:
    """A tokenizer with a token for each character, written as models are published."""
    ids = {"<end>": 0} | {text: index for index, text in enumerate(CHARACTERS, 1)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<end>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    published = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")
    published.save_pretrained(directory)


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("characters")
    publish_characters(directory)
    return load_tokenizer(str(directory))


@functools.cache
def weights() -> Params:
    layout = shardings(make_mesh(1, 1, 1), logical_axes(TINY), abstract_params(TINY), TRAIN_RULES)
    return init_params(TINY, jax.random.key(2), layout)


def student(tokenizer: Tokenizer, exam: ExamConfig, *axes: int) -> tuple[Generate, Params]:
    mesh = make_mesh(*axes)
    layout = shardings(mesh, logical_axes(TINY), abstract_params(TINY), TRAIN_RULES)
    generate = make_generate(TINY, tokenizer, mesh, exam=exam, compute_dtype=jnp.float32)
    return generate, jax.device_put(weights(), layout)


def answer(
    school: tuple[Generate, Params],
    order: Sequence[int],
    *,
    done: Collection[int] = (),
    samples: int = 2,
    round_index: int = 1,
    seed: int = 42,
) -> Results:
    """Completions by id; `done` are places in `order`."""
    generate, params = school
    found = list(
        generate(
            params,
            [PROMPTS[i] for i in order],
            [IDS[i] for i in order],
            samples=samples,
            seed=seed,
            round_index=round_index,
            done=done,
        )
    )
    assert sorted(index for index, _ in found) == sorted(set(range(len(order))) - set(done))
    return {IDS[order[index]]: completions for index, completions in found}


@pytest.fixture(scope="module")
def single(characters) -> tuple[Generate, Params]:
    return student(characters, EXAM, 1, 1, 1)


@pytest.fixture(scope="module")
def expected(single) -> Results:
    return answer(single, range(7))


def test_every_prompt_is_answered_once_with_its_own_rows(expected):
    assert set(expected) == set(IDS)
    rows = [completion for completions in expected.values() for completion in completions]
    assert len(rows) == 7 * 3
    long = [completion.text for completion in rows if completion.num_tokens > 4]
    assert len(long) > 10
    assert len(set(long)) == len(long)  # no two rows share their numbers
    assert {completion.finish_reason for completion in rows} == {"stop", "length"}
    for completion in rows:
        assert completion.num_tokens <= 12
        assert (completion.num_tokens < 12) <= (completion.finish_reason == "stop")
        assert "\n\n" not in completion.text
        missing = completion.num_tokens - len(completion.text)  # a token is a character
        assert missing == 0 if completion.finish_reason == "length" else missing in (1, 2)


def test_order_does_not_matter(single, expected):
    assert answer(single, [4, 2, 6, 0, 5, 1, 3]) == expected


@pytest.mark.parametrize("done", [{0}, {5, 2, 0}, {1, 2, 3, 4, 5, 6}, set(range(7))], ids=str)
def test_what_is_done_is_left_out_and_changes_nothing(single, expected, done):
    wanted = {name: rows for index, (name, rows) in enumerate(sorted(expected.items()))
              if index not in done}  # fmt: skip
    assert answer(single, range(7), done=done) == wanted


@functools.cache
def school_of(tokenizer: Tokenizer, slots: int, axes: tuple[int, int, int]):
    """One student for each setting, so that each is compiled once."""
    return student(tokenizer, EXAM.model_copy(update={"slots": slots}), *axes)


@pytest.mark.parametrize("seed", range(12))
def test_slots_devices_order_and_kills_do_not_matter(characters, expected, seed):
    """Killed as often as chance has it, and gone on with other slots, devices and order."""
    rng = np.random.default_rng(seed)
    found: Results = {}
    while len(found) < 7:
        slots = int(rng.choice([0, 8, 16, 48]))
        axes = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)][rng.integers(4)]
        generate, params = school_of(characters, slots, axes)
        order = rng.permutation(7).tolist()
        exam = generate(
            params,
            [PROMPTS[i] for i in order],
            [IDS[i] for i in order],
            samples=2,
            seed=42,
            round_index=1,
            done=[place for place, i in enumerate(order) if IDS[i] in found],
        )
        for place, completions in itertools.islice(exam, int(rng.integers(1, 8))):
            name = IDS[order[place]]
            assert name not in found
            found[name] = completions
    assert found == expected


def test_neighbours_do_not_matter(single, expected):
    # Without the shared beginning of seven prompts.
    assert answer(single, [3]) == {IDS[3]: expected[IDS[3]]}


@pytest.mark.parametrize(
    ("axes", "memory", "tensor"),
    [((2, 1, 2), 199, 2), ((1, 4, 2), 199, 2), ((2, 2, 1), 99, 4)],
    ids=str,
)
def test_the_layout_does_not_matter(characters, expected, axes, memory, tensor):
    """From any training layout to weights over `tensor` devices, the others answering too."""
    generate, params = student(characters, EXAM, *axes)
    engine = Engine(
        TINY,
        exam_mesh(make_mesh(*axes), 100, memory),  # as if the weights did not fit one device
        end_id=characters.end_id or 0,
        newlines=characters.newlines,
        sampling=Sampling(top_k=EXAM.top_k),
        compute_dtype=jnp.float32,
    )
    assert engine.mesh.shape["tensor"] == tensor
    up = engine.lay_out(params)["blocks"][0]["mlp"]["up"]
    assert {shard.data.size for shard in up.addressable_shards} == {up.size // tensor}
    assert answer((dataclasses.replace(generate, engine=engine), params), range(7)) == expected


def test_draws_follow_seed_round_and_id_and_greedy_follows_none(single, expected):
    for seed, round_index in ((43, 1), (42, 2)):
        found = answer(single, range(7), seed=seed, round_index=round_index)
        for name, (greedy, *drawn) in found.items():
            assert greedy == expected[name][0]
            assert drawn != list(expected[name][1:])


def test_every_row_has_numbers_of_its_own_wherever_it_stands():
    identities = [(seed, index, name) for seed in (1, 2) for index in (0, 1) for name in IDS]
    keys = [row_keys(*identity, 3) for identity in identities]
    assert len({tuple(key) for rows in keys for key in rows.tolist()}) == len(keys) * 3


def test_samples_do_not_depend_on_how_many_there_are(single, expected):
    alone = answer(single, range(7), samples=1)
    assert alone == {name: rows[:2] for name, rows in expected.items()}


def test_rows_stop_at_the_end_of_the_context_and_longer_prompts_are_cut(characters):
    generate, params = student(characters, EXAM, 1, 1, 1)
    prompts = ["0" * 75, "1" * 80, "2" * 100]
    found = dict(generate(params, prompts, prompts, samples=1, seed=1, round_index=0))
    assert found[2] == (Completion("", "length", 0),) * 2
    assert all(row.num_tokens == 1 for row in found[1])  # the last position chooses one more
    assert all(row.num_tokens <= 6 for row in found[0])
    assert any(row == Completion(row.text, "length", 6) for row in found[0])


def test_ids_and_prompts_must_match(single):
    generate, params = single
    with pytest.raises(ValueError, match="got 2 and 1 ids"):
        list(generate(params, ["a", "b"], ["a"], samples=0, seed=0, round_index=0))


class Spelled(Tokenizer):
    """A tokenizer that decodes to the ids themselves."""

    def __init__(self, tokenizer: Tokenizer):
        vars(self).update(vars(tokenizer))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def check_against_transformers(directory: Path, prompts: Sequence[str], count: int) -> None:
    """Greedy tokens equal those of `generate`, up to the first end token or blank line."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    config, tokenizer = read_model_config(directory), load_tokenizer(str(directory))
    mesh = make_mesh(1, 2, 1)
    layout = shardings(mesh, logical_axes(config), abstract_params(config), TRAIN_RULES)
    params = load_params(directory, config, layout)
    exam = EXAM.model_copy(update={"max_new_tokens": (count, 12)})
    generate = make_generate(config, tokenizer, mesh, exam=exam, compute_dtype=jnp.float32)
    spelled = dataclasses.replace(generate, tokenizer=Spelled(tokenizer))
    found = dict(spelled(params, prompts, prompts, samples=0, seed=0, round_index=0))
    assert len(found) == len(prompts)
    for index, prompt in enumerate(prompts):
        ids = tokenizer.encode_prompt(prompt)
        room = min(count, config.max_positions - len(ids) + 1)  # the last token takes no position
        with torch.no_grad():
            whole = published.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=tokenizer.end_id,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        blank = [i for i in range(room) if "\n\n" in tokenizer.decode(whole[: i + 1])]
        wanted = whole[: blank[0] + 1] if blank else whole
        (completion,) = found[index]
        assert completion.num_tokens == len(wanted)
        kept = wanted[:-1] if wanted[-1] == tokenizer.end_id else wanted
        assert completion.text == " ".join(map(str, kept))


STORIES = ["Once upon a time", "Lily and Tom saw", "The dog", "He said: I", "In the big box was a"]


@pytest.mark.parametrize(
    ("name", "prompts", "count"),
    [
        ("stories260k", STORIES, 60),
        ("babyllama-361", STORIES, 40),
        ("mathgpt-add3", ["123+456=", "7+45=", "99+1=", "50+500="], 9),
    ],
)
def test_greedy_equals_transformers_on_real_models(shared, name, prompts, count):
    check_against_transformers(shared / "models" / name, prompts, count)


FAMILIES = [
    "gpt2", "gpt-neo", "gptj", "opt-350m", "gpt-neox", "llama-3", "qwen2", "qwen3", "gemma2",
    "gemma3", "mistral",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_in_refilled_slots(tmp_path, family):
    torch = pytest.importorskip("torch")
    published = make_published(tmp_path, family)
    published.generation_config.eos_token_id = None
    config = read_model_config(tmp_path)
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(1, 21, 12), rng.integers(3, 20, 12)
    prompts = [Prompt(i, rng.integers(0, 131, n).tolist()) for i, n in enumerate(lengths)]
    for prompt, limit in zip(prompts, limits, strict=True):
        prompt.rows = [Row(prompt, 0, int(limit), np.zeros(2, np.uint32))]
    engine = Engine(
        config,
        make_mesh(1, 1, 1),
        end_id=-1,
        newlines=np.zeros(config.vocab_size, np.uint8),
        sampling=Sampling(),
        compute_dtype=jnp.float32,
    )
    weights = engine.lay_out(load_params(tmp_path, config, whole(config)))
    found = list(sit(engine, weights, [], prompts, owed=range(12), slots=8))
    assert len(found) == 12
    for prompt in found:
        ids, limit = prompt.tokens, prompt.rows[0].limit
        with torch.no_grad():
            text = published.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=0,
            )[0].tolist()
        assert prompt.rows[0].chosen == text[len(ids) :]
