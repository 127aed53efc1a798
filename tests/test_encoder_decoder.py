"""T5 against transformers, against itself token by token, and through a whole run."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from random_models import make_params, make_rows, whole
from safetensors.numpy import load_file
from samples import assert_same_training, make_samples
from test_rounds import Runs, lines, num_answers, records, stage

from distill_jax import plain_packing
from distill_jax.checkpoint import load_params as load_checkpoint
from distill_jax.config import ExamConfig
from distill_jax.engine import Engine
from distill_jax.families.config_json import find_family, find_family_for, read_config
from distill_jax.generate import make_generate, sit
from distill_jax.packing import Grid
from distill_jax.scratch import make_tokenizer
from distill_jax.slots import Prompt, Row
from distill_jax.student import decode
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.attention import Segment
from distill_jax.student.encoder_decoder import make_buckets
from distill_jax.student.flops import step_flops
from distill_jax.student.model import logits, narrow, with_params
from distill_jax.student.objective import Objective
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import TRAIN_RULES, make_mesh
from distill_jax.student.step import (
    bind_states,
    gradients,
    init_state,
    make_optimizer,
    make_step,
    put_batch,
    warmup_schedule,
)
from distill_jax.tokenizer import Tokenizer, load_tokenizer
from distill_jax.weights import load_params, read_model_config, save_model

TOLERANCE = 1e-4
T5 = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 70,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
PUBLISHED = {
    "t5": T5,
    "t5-v1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "flan-t5": T5
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_model": 40},
    "t5-gated-silu": T5 | {"feed_forward_proj": "gated-silu"},
}


def published_config(name: str) -> transformers.T5Config:
    return transformers.T5Config(**PUBLISHED[name], architectures=["T5ForConditionalGeneration"])


@functools.cache
def variant(name: str) -> EncoderDecoderConfig:
    published = json.loads(published_config(name).to_json_string())
    config = read_config(find_family(published), published)
    assert isinstance(config, EncoderDecoderConfig)
    return config


def make_published(directory, name) -> Any:
    """A random model; all but the plain ones have a head that is not the embedding."""
    torch = pytest.importorskip("torch", reason="the reference")
    torch.manual_seed(3)
    model = transformers.T5ForConditionalGeneration(published_config(name))
    if name in ("t5-v1.1", "flan-t5"):
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(directory)
    return model.eval()


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens, mask, texts):
    model = with_params(config, params)
    states = model.encode(tokens, mask, dtype=jnp.float32)
    hidden, _ = model.decode(texts, model.remember(states, mask), dtype=jnp.float32)
    return states, hidden


def make_texts(config, rows: int, length: int, seed: int = 5):
    texts = np.random.default_rng(seed).integers(1, config.vocab_size, (rows, length))
    texts[:, 0] = config.start_id
    return texts


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_transformers_in_and_out(name, tmp_path, shared):
    torch = pytest.importorskip("torch", reason="the reference")
    published = make_published(tmp_path / "source", name)
    config = read_model_config(tmp_path / "source")
    assert config.tied_head == (name not in ("t5-v1.1", "flan-t5"))
    assert config.head_scale == (1.0 if "tie_word_embeddings" in PUBLISHED[name] else 48**-0.5)
    mesh = make_mesh(1, 2, 2)
    params = load_params(tmp_path / "source", config, whole(config, mesh, TRAIN_RULES))
    texts = make_texts(config, 4, 30)
    for left in (True, False):
        tokens, _, mask = make_rows([9, 5, 40, 1], vocab_size=config.vocab_size, left=left)
        states, hidden = run(config, params, tokens, mask, texts)
        with torch.no_grad():
            out = published(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask).long(),
                decoder_input_ids=torch.tensor(texts),
                output_hidden_states=True,
            )
        theirs = out.encoder_last_hidden_state.numpy()
        assert np.abs(np.asarray(states) - theirs)[mask].max() < TOLERANCE
        apart = np.abs(np.asarray(hidden) - out.decoder_hidden_states[-1].numpy()).max()
        ours = np.asarray(logits(config, params, hidden))[..., : config.vocab_size]
        scores_apart = np.abs(ours - out.logits.numpy()).max()
        print(f"{name}: states {apart:.1e}, logits {scores_apart:.1e} from transformers")
        assert max(apart, scores_apart) < TOLERANCE
        assert np.isfinite(states).all()

    tokenizer = load_tokenizer(str(shared / "models" / "tokenizers" / "flan-t5"))
    save_model(tmp_path / "out", config, params, tokenizer, source=tmp_path / "source")
    stored, written = (load_file(tmp_path / x / "model.safetensors") for x in ("source", "out"))
    assert stored.keys() == written.keys()
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    found, wanted = back.state_dict(), published.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    said = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("source", "out")]
    assert said[0] == said[1]
    if config.tied_head:
        assert find_family_for(config).architecture == "T5ForConditionalGeneration"


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_token_by_token_equals_the_whole(name):
    config = variant(name)
    params, texts = make_params(config), make_texts(config, 6, 9)
    tokens, _, mask = map(jnp.asarray, make_rows([9, 5, 12], vocab_size=131, left=True))
    _, expected = run(
        config, params, np.repeat(tokens, 2, axis=0), np.repeat(mask, 2, axis=0), texts
    )

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def go_on(params, before, start, stop):
        model, rows = with_params(config, params), jnp.asarray(texts[:, start:stop])
        memory = model.remember(model.encode(tokens, mask, dtype=jnp.float32), mask)
        places = jnp.broadcast_to(jnp.arange(start, stop)[None], rows.shape)
        return model.decode(rows, memory, before, places, dtype=jnp.float32)

    hidden, before = go_on(params, None, 0, 3)
    np.testing.assert_allclose(hidden, expected[:, :3], atol=TOLERANCE)
    for t in range(3, 7):
        hidden, new = go_on(params, before, t, t + 1)
        np.testing.assert_allclose(hidden[:, 0], expected[:, t], atol=TOLERANCE)
        parts: Any = zip(before[:4], new[:4], (3, 3, 1, 1), strict=True)  # axes of tokens
        longer: Any = [jnp.concatenate((x, y), axis) for x, y, axis in parts]
        before = Segment(*longer)


@pytest.mark.parametrize(("count", "far"), [(32, 128), (8, 20), (32, 20), (12, 500)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_every_distance_is_in_the_published_bucket(count, far, both_ways):
    torch = pytest.importorskip("torch", reason="the reference")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-far, far + 1)
    theirs = T5Attention._relative_position_bucket(distances, both_ways, count, far)
    np.testing.assert_array_equal(make_buckets(count, far, both_ways=both_ways), theirs)


def pack(samples, objective, grid, *, shared: int = 0):
    items = [item._replace(prompt=item.prompt[shared:]) for item in samples]
    common = samples[0].prompt[:shared]
    shapes = plain_packing.plan_shapes([items], grid, objective)
    return plain_packing.pack(items, grid, shapes, shared=common, objective=objective)


def in_torch(model, samples, *, prefix_gradient: bool):
    """Both losses, one text after the other: no batch, no padding, no shared encoder."""
    import torch

    def read(item, text, *, cut: bool):
        prompt = torch.tensor([item.prompt])
        states = model.encoder(prompt).last_hidden_state
        inputs = torch.tensor([[model.config.decoder_start_token_id, *text]])
        if not cut:
            return model(
                encoder_outputs=(states,), decoder_input_ids=inputs, output_hidden_states=True
            )
        # The keys and values of the prompt are what is cut off, as in a decoder.
        begun = model(encoder_outputs=(states,), decoder_input_ids=inputs[:, :1], use_cache=True)
        cache = begun.cache.cross_attention_cache
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return model(
            encoder_outputs=(states,),
            decoder_input_ids=inputs,
            cache=transformers.EncoderDecoderCache(transformers.DynamicCache(), cache),
            output_hidden_states=True,
        )

    def last(item, text):
        return read(item, text, cut=not prefix_gradient).decoder_hidden_states[-1][0, -1]

    nll, count, costs = torch.zeros(()), 0, []
    for item in samples:
        scores = read(item, item.anchor, cut=False).logits[0, :-1].log_softmax(-1)
        nll = nll - scores[range(len(item.anchor)), list(item.anchor)].sum()
        count += len(item.anchor)
        if item.positive and item.negative:
            states = [last(item, text) for text in (item.anchor, item.positive, item.negative)]
            near, far = (
                1 - torch.cosine_similarity(states[0], other, dim=0) for other in states[1:]
            )
            costs.append(torch.relu(near - far + 1.0))
    return nll / count, torch.stack(costs).mean()


@pytest.mark.parametrize("prefix_gradient", [True, False])
def test_losses_and_gradients_equal_those_of_one_text_after_the_other(prefix_gradient, tmp_path):
    pytest.importorskip("torch", reason="the reference")
    published = make_published(tmp_path / "source", "flan-t5")
    config = read_model_config(tmp_path / "source")
    params = load_params(tmp_path / "source", config, whole(config))
    samples = make_samples(1, config.vocab_size, 5)
    objective = Objective(prefix_gradient=prefix_gradient)
    batch = pack(samples, objective, Grid(2, 1, 3), shared=5)
    mesh = make_mesh(1, 1, 1)
    states = bind_states(config, mesh, compute_dtype=jnp.dtype("float32"), remat="dots")
    call = functools.partial(gradients, config, objective=objective, states=states)
    grads, figures = jax.jit(call)(params, batch)

    lm, triplet = in_torch(published, samples, prefix_gradient=prefix_gradient)
    (lm + 0.5 * triplet).backward()
    assert triplet.item() > 0.1
    np.testing.assert_allclose(figures["lm_loss"], lm.item(), rtol=1e-5)
    np.testing.assert_allclose(figures["reflection_loss"], triplet.item(), rtol=1e-5)
    save_model(
        tmp_path / "grads", config, grads, Tokenizer(make_tokenizer()), source=tmp_path / "source"
    )
    found = load_file(tmp_path / "grads" / "model.safetensors")
    wanted = {name: np.asarray(p.grad) for name, p in published.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(np.abs(value).max(), 1e-3)
        assert np.abs(found[name] - value).max() < 2e-5 * scale, name


def test_four_devices_take_the_steps_of_one():
    config = dataclasses.replace(variant("t5"), heads=4, kv_heads=4)
    objective = Objective()

    def train(mesh, shards):
        optimizer = make_optimizer(warmup_schedule(1e-4, 0), 0.01)
        state, layout = init_state(make_params(config, mesh=mesh), optimizer, mesh)
        step = make_step(
            config,
            optimizer,
            objective,
            mesh=mesh,
            state_shardings=layout,
            compute_dtype=jnp.dtype("float32"),
            remat="none",
        )
        losses, means = [], []
        for index in range(2):
            samples = make_samples(index, config.vocab_size, 4)
            batch = pack(samples, objective, Grid(1, shards, 6 // shards), shared=4)
            assert step_flops(config, batch.counts, objective) > 0
            state, figures = step(state, put_batch(batch, mesh))
            losses.append(float(figures["loss"]))
            means.append(jax.device_get(optax.tree.get(state.opt_state, "mu")))
        up = state.params["decoder"]["mlp"]["up"]
        assert up.addressable_shards[0].data.size == up.size // mesh.size
        return jax.device_get(state), losses, means

    one, losses, means = train(make_mesh(1, 1, 1), 1)
    many, others, _ = train(make_mesh(1, 2, 2), 2)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert_same_training(one, many, means)


@pytest.mark.parametrize("prefix_gradient", [True, False])
def test_tokens_are_counted_on_both_sides_and_copies_only_with_a_pair(prefix_gradient):
    samples, grid = make_samples(1, 131, 5), Grid(2, 1, 3)
    objective = Objective(prefix_gradient=prefix_gradient)
    batch = pack(samples, objective, grid, shared=5)
    rest = [item._replace(prompt=item.prompt[5:]) for item in samples]
    (shape,) = plain_packing.plan_shapes([rest], grid, objective).values()
    shared = samples[0].prompt[:5]
    computed = plain_packing.count_tokens(shape, grid, shared=shared, objective=objective)
    assert batch.computed == computed
    answers = [
        len(x.anchor) * (1 if prefix_gradient or not x.positive else 2)
        + len(x.positive) + len(x.negative)
        for x in samples
    ]  # fmt: skip
    assert batch.counts.useful == sum(len(x.prompt) for x in samples) + sum(answers) <= computed


def test_narrow_weights_make_the_same_bits():
    config, half = variant("t5"), jnp.bfloat16
    tokens, _, mask = make_rows([9, 5], vocab_size=config.vocab_size)
    params, texts = make_params(config), make_texts(config, 2, 6)

    @jax.jit
    def score(params, tokens, mask, texts):
        model = with_params(config, params)
        memory = model.remember(model.encode(tokens, mask, dtype=half), mask)
        return logits(config, params, model.decode(texts, memory, dtype=half)[0])

    fewer, exact = (score(x, tokens, mask, texts) for x in (narrow(params, half), params))
    np.testing.assert_array_equal(fewer, exact)


def make_engine(config, newlines, *sizes: int) -> Engine:
    return Engine(
        config,
        make_mesh(*(sizes or (1, 1, 1))),
        end_id=-1,
        newlines=newlines,
        sampling=Sampling(),
        compute_dtype=jnp.float32,
    )


def make_prompts(config) -> list[Prompt]:
    """Texts of the encoder on one to three pages, with one greedy row each."""
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(1, 80, 12), rng.integers(3, 40, 12)
    prompts = []
    for index, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        prompt = Prompt(index, [*rng.integers(1, 131, length).tolist(), config.start_id])
        prompt.rows = [Row(prompt, 0, int(limit), np.zeros(2, np.uint32))]
        prompts.append(prompt)
    return prompts


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_greedy_equals_transformers_in_refilled_slots_and_stops_at_a_blank_line(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference")
    published = make_published(tmp_path, name)
    published.generation_config.eos_token_id = None
    config = read_model_config(tmp_path)
    params, nothing = load_params(tmp_path, config, whole(config)), np.zeros(131, np.uint8)

    def answer(newlines: np.ndarray) -> dict[int, Row]:
        engine = make_engine(config, newlines)
        prompts = make_prompts(config)
        found = sit(engine, engine.lay_out(params), [], prompts, owed=range(12), slots=8)
        return {prompt.index: prompt.rows[0] for prompt in found}

    rows = answer(nothing)
    for prompt in make_prompts(config):
        limit = prompt.rows[0].limit
        with torch.no_grad():
            ids = torch.tensor([prompt.tokens[:-1]])
            text = published.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
            )
        assert rows[prompt.index].chosen == text[0, 1:].tolist()
        assert not rows[prompt.index].stopped

    said = [token for row in rows.values() for token in row.chosen]
    blank = int(np.argmax(np.bincount(said)))
    nothing[blank] = decode.BLANK
    stopped = answer(nothing)
    for index, row in stopped.items():
        free = rows[index].chosen
        end = free.index(blank) + 1 if blank in free else len(free)
        assert (row.chosen, row.stopped) == (free[:end], blank in free)
    assert len({len(row.chosen) for row in stopped.values()}) > 3
    assert {row.stopped for row in stopped.values()} == {True, False}


def test_answers_are_those_of_transformers_wherever_they_are_computed(tmp_path, shared):
    torch = pytest.importorskip("torch", reason="the reference")
    name = str(shared / "models" / "tokenizers" / "flan-t5")
    PUBLISHED["answers"] = PUBLISHED["t5"] | {"vocab_size": 32128, "d_model": 16}
    try:
        published = make_published(tmp_path / "source", "answers")
    finally:
        del PUBLISHED["answers"]
    config = read_model_config(tmp_path / "source")
    tokenizer = load_tokenizer(name, ends_prompts=True)
    prompts = [f"Question: {'a lot of ' * i}{i} apples?\nReasoning:" for i in range(1, 6)]
    ids = [f"q/{i}" for i in range(5)]

    def answer(*sizes: int, slots: int = 8, done=()):
        mesh = make_mesh(*sizes)
        params = load_params(tmp_path / "source", config, whole(config, mesh, TRAIN_RULES))
        exam = ExamConfig(top_k=0, max_new_tokens=(9, 6), slots=slots)
        generate = make_generate(config, tokenizer, mesh, exam=exam, compute_dtype=jnp.float32)
        if sizes[2] > 1:  # as it were if the weights did not fit one device
            engine = make_engine(config, tokenizer.newlines, *sizes)
            generate = dataclasses.replace(generate, engine=engine)
        settings = {"samples": 2, "seed": 1, "round_index": 1}
        return dict(generate(params, prompts, ids, **settings, done=done))

    one = answer(1, 1, 1)
    assert sorted(one) == [0, 1, 2, 3, 4]
    assert answer(1, 1, 1, slots=16, done={0, 3}) == {i: one[i] for i in (1, 2, 4)}
    assert answer(1, 2, 1) == answer(1, 1, 2) == one
    assert len({completion.text for row in one.values() for completion in row[1:]}) > 5
    official = transformers.AutoTokenizer.from_pretrained(name)
    for index, prompt in enumerate(prompts):
        tokens = official(prompt, return_tensors="pt").input_ids
        assert tokens[0].tolist() == tokenizer.encode_prompt(prompt)
        with torch.no_grad():
            made = published.generate(tokens, max_new_tokens=9, do_sample=False)[0, 1:].tolist()
        greedy = one[index][0]
        assert greedy.num_tokens == len(made)
        assert greedy.text == tokenizer.decode(made)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny random T5 that reads arithmetic."""
    tokenizer = make_tokenizer()
    config = dataclasses.replace(
        variant("t5"), vocab_size=len(tokenizer), width=16, head_dim=8, heads=2, kv_heads=2,
        mlp_width=24, encoder_layers=2, head_scale=16**-0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5") / "student"
    save_model(folder, config, make_params(config), Tokenizer(tokenizer), source=None)
    assert read_model_config(folder) == config
    return folder


def test_two_rounds_go_on_where_they_were_killed_and_are_exported(student, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference")
    runs, settings = Runs(tmp_path), (f"student.model={student}", "exam.max_new_tokens=[40, 12]")
    folder = runs.finish("t5", *settings)
    for round_index in (1, 2):
        rows = json.loads(stage(folder, round_index, "x").with_name("round.json").read_text())
        assert rows["rows"] > 0 and rows["steps"] > 4
    assert not json.loads((folder / "result.json").read_text())["stop_reason"].startswith("none")
    runs.kill_when("killed", lambda: lines(tmp_path / "killed", 1, "metrics") >= 5, *settings)
    again = runs.finish("killed", *settings)
    assert records(again) == records(folder)
    assert num_answers(again) == num_answers(folder)

    out = tmp_path / "out"
    command = ["export", str(folder), "--round", "2", "--to", str(out)]
    subprocess.run([sys.executable, "-m", "distill_jax", *command], check=True)
    config = read_model_config(out)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        make_params(config),
        whole(config),
    )
    trained = load_checkpoint(folder / "round_02" / "checkpoint", like)
    model = transformers.T5ForConditionalGeneration.from_pretrained(out).eval()
    tokens, _, mask = make_rows([9, 5, 40, 1], vocab_size=config.vocab_size)
    texts = make_texts(config, 4, 30)
    with torch.no_grad():
        scores = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            decoder_input_ids=torch.tensor(texts),
        ).logits.numpy()
    ours = logits(config, trained, run(config, trained, tokens, mask, texts)[1])
    assert np.abs(np.asarray(ours)[..., : config.vocab_size] - scores).max() < TOLERANCE
