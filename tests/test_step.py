"""The tree step against the original's flat passes in PyTorch, and against itself cut up."""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import GPT2, LLAMA, make_params

from distill_jax import weights
from distill_jax.scratch import make_tokenizer
from distill_jax.student.model import ModelConfig, forward
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import (
    gradients,
    init_state,
    make_optimizer,
    make_step,
    put_batch,
    warmup_schedule,
)
from distill_jax.student.tree import Batch, Objective, Stretch
from distill_jax.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="the reference is the original's step in PyTorch")
torch.set_num_threads(1)  # two would spin, waiting for each other, on models this small
transformers = pytest.importorskip("transformers")
original_step = pytest.importorskip("original_step")

FAMILIES = {"llama": LLAMA, "gpt2": GPT2}
exact = partial(forward, compute_dtype=jnp.float32)


def make_samples(seed: int, vocab: int, shared: int) -> list:
    """Six samples of unequal lengths behind the same beginning; two have no pair."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> list[int]:
        return rng.integers(3, vocab, rng.integers(low, high)).tolist()

    beginning = text(shared, shared + 1) if shared else []
    return [
        original_step.Sample(
            prompt=[*beginning, *text(2, 7)],
            anchor=[*text(3, 9), 2],
            positive=[*text(2, 10), 2] if i % 3 else (),
            negative=[*text(1, 8), 2] if i % 3 else (),
        )
        for i in range(6)
    ]


def make_batch(samples: list, shared: int, *, fill: int = 0) -> Batch:
    def stretch(texts: list, width: int = 12) -> Stretch:  # one shape, one compilation
        tokens = np.zeros((len(texts) + fill, width), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return Stretch(jnp.asarray(tokens), jnp.asarray(mask))

    return Batch(
        shared=jnp.asarray(samples[0].prompt[:shared], jnp.int32),
        question=stretch([s.prompt[shared:] for s in samples]),
        anchor=stretch([s.anchor for s in samples]),
        positive=stretch([s.positive for s in samples]),
        negative=stretch([s.negative for s in samples]),
        valid=jnp.asarray([bool(s.positive) for s in samples] + [False] * fill),
        real=jnp.asarray([True] * len(samples) + [False] * fill),
    )


@functools.cache
def compiled(config: ModelConfig, objective: Objective, microbatches: int):
    options = {"objective": objective, "microbatches": microbatches}
    return jax.jit(partial(gradients, config, forward=partial(exact, config), **options))


def compute(
    config: ModelConfig, params: dict, batch: Batch, objective: Objective, microbatches: int = 1
):
    return compiled(config, objective, microbatches)(params, batch)


def assert_close(got, expected, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest value of its expected leaf."""
    for (path, value), wanted in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(wanted).max()), 1e-3)
        error = float(np.abs(np.asarray(value) - np.asarray(wanted)).max())
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error / scale:.2e}"


def save(folder: Path, config: ModelConfig, params: dict) -> None:
    weights.save_model(folder, config, params, Tokenizer(make_tokenizer()), source=None)


def in_torch(config: ModelConfig, params: dict, folder: Path):
    """The same weights in transformers."""
    save(folder, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix_gradient", [False, True])
def test_losses_and_gradients_equal_the_originals(family, prefix_gradient, tmp_path):
    config, shared = FAMILIES[family], 5
    params = make_params(config)
    samples = make_samples(1, config.vocab_size, shared)
    objective = Objective(prompt_weight=0.1, margin=1.0, prefix_gradient=prefix_gradient)
    grads, figures = compute(config, params, make_batch(samples, shared), objective)

    model = in_torch(config, params, tmp_path / "model")
    lm, triplet = original_step.original_losses(
        model, samples, prompt_weight=0.1, margin=1.0, prefix_gradient=prefix_gradient
    )
    (lm + 0.5 * triplet).backward()
    assert triplet.item() > 0.1
    np.testing.assert_allclose(figures["lm_loss"], lm.item(), rtol=1e-5)
    np.testing.assert_allclose(figures["reflection_loss"], triplet.item(), rtol=1e-5)
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    save(tmp_path / "grads", config, grads)
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grads")
    found = {name: p.detach().numpy() for name, p in got.named_parameters()}
    assert found.keys() == expected.keys()
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("prefix_gradient", [False, True])
def test_ten_steps_of_adamw_end_at_the_same_weights(prefix_gradient, tmp_path):
    config, shared = LLAMA, 4
    params = make_params(config)
    model = in_torch(config, params, tmp_path / "model")
    mesh = make_mesh(1, 1, 1)
    optimizer = make_optimizer(warmup_schedule(1e-3, 4), 0.01)
    state, layout = init_state(params, optimizer, mesh)
    objective = Objective(prefix_gradient=prefix_gradient)
    step = make_step(
        config,
        optimizer,
        objective,
        mesh=mesh,
        state_shardings=layout,
        compute_dtype=jnp.dtype(jnp.float32),
    )
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for index in range(10):
        samples = make_samples(index, config.vocab_size, shared)
        state, _ = step(state, put_batch(make_batch(samples, shared), mesh))
        theirs.zero_grad()
        lm, triplet = original_step.original_losses(
            model, samples, prompt_weight=0.1, margin=1.0, prefix_gradient=prefix_gradient
        )
        (lm + 0.5 * triplet).backward()
        theirs.param_groups[0]["lr"] = 1e-3 * min(np.log(index + 1) / np.log(4), 1.0)
        theirs.step()
    weights.save_model(
        tmp_path / "ours", config, state.params, Tokenizer(make_tokenizer()), source=None
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(ours[name].numpy(), value.numpy(), atol=1e-4)


def test_updates_of_a_millionth_do_not_vanish_in_half_precision():
    mesh, config = make_mesh(1, 1, 1), LLAMA
    params = jax.tree.map(lambda x: jnp.sign(x) * 0.5 + x, make_params(config))
    before = jax.tree.map(np.asarray, params)
    optimizer = make_optimizer(warmup_schedule(1e-6, 0), 0.0)
    state, layout = init_state(params, optimizer, mesh)
    step = make_step(
        config,
        optimizer,
        Objective(),
        mesh=mesh,
        state_shardings=layout,
        compute_dtype=jnp.dtype(jnp.bfloat16),
    )
    samples = make_samples(0, config.vocab_size, 3)
    state, _ = step(state, put_batch(make_batch(samples, 3), mesh))
    moved = jax.tree.map(lambda x, y: np.mean(np.asarray(x) != y), state.params, before)
    assert state.params["blocks"]["mlp"]["up"].dtype == jnp.float32
    assert moved["blocks"]["mlp"]["up"] > 0.9


def test_the_shared_beginning_may_be_cut_anywhere():
    config = GPT2
    params, samples = make_params(config), make_samples(2, config.vocab_size, 6)
    objective = Objective(prefix_gradient=True)
    whole, figures = compute(config, params, make_batch(samples, 6), objective)
    for shared in (0, 1, 4):
        grads, others = compute(config, params, make_batch(samples, shared), objective)
        np.testing.assert_allclose(others["loss"], figures["loss"], rtol=1e-6)
        assert_close(grads, whole, 1e-5)


def test_microbatches_add_up_to_the_whole_batch():
    params, samples = make_params(LLAMA), make_samples(3, LLAMA.vocab_size, 4)
    batch = make_batch(samples, 4)
    whole, figures = compute(LLAMA, params, batch, Objective())
    for parts in (2, 3, 6):
        grads, others = compute(LLAMA, params, batch, Objective(), microbatches=parts)
        assert_close(others, figures, 1e-6)
        assert_close(grads, whole, 1e-5)


def test_rows_that_only_fill_the_batch_weigh_nothing():
    params, samples = make_params(LLAMA), make_samples(4, LLAMA.vocab_size, 4)
    whole, figures = compute(LLAMA, params, make_batch(samples, 4), Objective())
    grads, others = compute(LLAMA, params, make_batch(samples, 4, fill=3), Objective())
    assert_close(others, figures, 1e-6)
    assert_close(grads, whole, 1e-5)


def test_without_reflection_the_pairs_change_nothing():
    params, samples = make_params(LLAMA), make_samples(5, LLAMA.vocab_size, 4)
    none = Objective(reflection="none")
    alone = [original_step.Sample(s.prompt, s.anchor) for s in samples]
    grads, figures = compute(LLAMA, params, make_batch(samples, 4), none)
    others, _ = compute(LLAMA, params, make_batch(alone, 4), none)
    assert float(figures["reflection_loss"]) == 0.0
    assert_close(others, grads, 1e-7)


def test_remat_changes_memory_and_not_the_gradient():
    params, samples = make_params(LLAMA), make_samples(6, LLAMA.vocab_size, 4)
    batch = make_batch(samples, 4)

    def run(remat: bool):
        bound = partial(exact, LLAMA, remat=remat)
        call = partial(gradients, LLAMA, objective=Objective(), forward=bound)
        text = str(jax.make_jaxpr(call)(params, batch))
        return jax.jit(call)(params, batch)[0], text

    (plain, plain_text), (saved, saved_text) = run(False), run(True)
    assert "prevent_cse=False" in saved_text and "prevent_cse=False" not in plain_text
    assert_close(saved, plain, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_eight_devices_take_the_same_steps_as_one(sizes):
    config = LLAMA

    def train(mesh):
        optimizer = make_optimizer(warmup_schedule(1e-3, 2), 0.01)
        state, layout = init_state(make_params(config, mesh=mesh), optimizer, mesh)
        step = make_step(
            config,
            optimizer,
            Objective(),
            mesh=mesh,
            state_shardings=layout,
            compute_dtype=jnp.dtype(jnp.float32),
            microbatches=2,
        )
        losses = []
        for index in range(3):
            samples = make_samples(index, config.vocab_size, 4)
            batch = make_batch(samples, 4, fill=10)
            state, figures = step(state, put_batch(batch, mesh))
            losses.append(float(figures["loss"]))
            jax.block_until_ready(state)  # fake devices stall when many programs wait at once
        assert step._cache_size() == 1, "the layout of the state changed, and all was compiled anew"
        return state, losses

    one, losses = train(make_mesh(1, 1, 1))
    many, others = train(make_mesh(*sizes))
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for name in ("params", "opt_state"):
        for x, y in zip(
            jax.tree.leaves(getattr(many, name)), jax.tree.leaves(getattr(one, name)), strict=True
        ):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-4, atol=2e-6)
    up = many.params["blocks"]["mlp"]["up"]
    moments = [x for x in jax.tree.leaves(many.opt_state) if x.shape == up.shape]
    assert len(moments) >= 2 and {x.sharding for x in moments} == {up.sharding}
    assert not up.sharding.is_fully_replicated


def test_warmup_reaches_half_at_its_square_root_then_stays():
    schedule = warmup_schedule(2.0, 100)
    rates = np.array([schedule(t) for t in (0, 9, 99, 5000)])
    np.testing.assert_allclose(rates, [0.0, 1.0, 2.0, 2.0], 1e-6)
