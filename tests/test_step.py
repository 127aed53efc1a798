"""The tree step against the original's flat passes in PyTorch, and against itself cut up."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import LLAMA, make_params, variant
from samples import APART, make_batch, make_samples
from test_model import equations

from distill_jax import weights
from distill_jax.packing import Grid, Item
from distill_jax.scratch import make_tokenizer
from distill_jax.student.architecture import ADAPTABLE, Lora
from distill_jax.student.model import ModelConfig, Remat
from distill_jax.student.objective import Objective
from distill_jax.student.sharding import make_mesh
from distill_jax.student.step import (
    bind_states,
    gradients,
    init_state,
    make_optimizer,
    make_step,
    put_batch,
    warmup_schedule,
)
from distill_jax.student.tree import Batch
from distill_jax.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="the reference is the original's step in PyTorch")
torch.set_num_threads(1)  # two would spin, waiting for each other, on models this small
transformers = pytest.importorskip("transformers")
pytorch_baseline = pytest.importorskip("pytorch_baseline")

BOTH = pytest.mark.parametrize("prefix_gradient", [False, True])


@functools.cache
def compiled(config: ModelConfig, objective: Objective):
    states = bind_states(
        config, make_mesh(1, 1, 1), compute_dtype=jnp.dtype("float32"), remat="dots"
    )
    return jax.jit(functools.partial(gradients, config, objective=objective, states=states))


def compute(config: ModelConfig, params: dict, batch: Batch, objective: Objective, reference=None):
    return compiled(config, objective)(params, batch, reference=reference)


def train(config: ModelConfig, objective: Objective, mesh, optimizer, dtype="float32"):
    """A fresh state, and the compiled step."""
    state, layout = init_state(make_params(config, mesh=mesh), optimizer, mesh)
    step = make_step(
        config,
        optimizer,
        objective,
        mesh=mesh,
        state_shardings=layout,
        compute_dtype=jnp.dtype(dtype),
        remat="dots",
    )
    return state, step


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


def in_original(model, samples: list[Item], prefix_gradient: bool):
    """Both losses of the original."""
    return pytorch_baseline.original_losses(
        model, samples, prompt_weight=0.1, margin=1.0, prefix_gradient=prefix_gradient
    )


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@BOTH
def test_losses_and_gradients_equal_the_originals(family, prefix_gradient, tmp_path):
    config, shared = variant(family), 5
    params = make_params(config)
    samples = make_samples(1, config.vocab_size, shared)
    objective = Objective(prefix_gradient=prefix_gradient)
    batch = make_batch(samples, shared, objective, shape=APART)
    grads, figures = compute(config, params, batch, objective)

    model = in_torch(config, params, tmp_path / "model")
    lm, triplet = in_original(model, samples, prefix_gradient)
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


@BOTH
def test_ten_steps_of_adamw_end_at_the_same_weights(prefix_gradient, tmp_path):
    config, shared, mesh = LLAMA, 4, make_mesh(1, 1, 1)
    model = in_torch(config, make_params(config), tmp_path / "model")
    objective = Objective(prefix_gradient=prefix_gradient)
    optimizer = make_optimizer(warmup_schedule(1e-3, 4), 0.01)
    state, step = train(config, objective, mesh, optimizer)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for index in range(10):
        samples = make_samples(index, config.vocab_size, shared)
        state, _ = step(state, put_batch(make_batch(samples, shared, objective), mesh))
        theirs.zero_grad()
        lm, triplet = in_original(model, samples, prefix_gradient)
        (lm + 0.5 * triplet).backward()
        theirs.param_groups[0]["lr"] = 1e-3 * min(np.log(index + 1) / np.log(4), 1.0)
        theirs.step()
    save(tmp_path / "ours", config, state.params)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(ours[name].numpy(), value.numpy(), atol=1e-4)


def test_updates_of_a_millionth_do_not_vanish_in_half_precision():
    mesh, config, objective = make_mesh(1, 1, 1), LLAMA, Objective()
    optimizer = make_optimizer(warmup_schedule(1e-6, 0), 0.0)
    state, step = train(config, objective, mesh, optimizer, "bfloat16")
    params = jax.tree.map(lambda x: jnp.sign(x) * 0.5 + x, state.params)
    before = jax.tree.map(np.array, params)
    batch = make_batch(make_samples(0, config.vocab_size, 3), 3, objective)
    state, _ = step(state._replace(params=params), put_batch(batch, mesh))
    moved = jax.tree.map(lambda x, y: np.mean(np.asarray(x) != y), state.params, before)
    assert state.params["blocks"]["mlp"]["up"].dtype == jnp.float32
    assert moved["blocks"]["mlp"]["up"] > 0.9


def test_the_shared_beginning_may_be_cut_anywhere():
    config, objective = LLAMA, Objective(prefix_gradient=True)
    params, samples = make_params(config), make_samples(2, config.vocab_size, 6)
    whole, figures = compute(config, params, make_batch(samples, 6, objective), objective)
    for shared in (0, 1, 4):
        batch = make_batch(samples, shared, objective)
        grads, others = compute(config, params, batch, objective)
        np.testing.assert_allclose(others["loss"], figures["loss"], rtol=1e-6)
        assert_close(grads, whole, 1e-5)


def test_lines_and_microbatches_add_up_to_the_whole_batch():
    params, samples, objective = make_params(LLAMA), make_samples(3, 301, 4), Objective()
    whole, figures = compute(LLAMA, params, make_batch(samples, 4, objective), objective)
    for grid in (Grid(2, 1, 3), Grid(1, 3, 2), Grid(2, 2, 2), Grid(6, 1, 1)):
        batch = make_batch(samples, 4, objective, grid)
        grads, others = compute(LLAMA, params, batch, objective)
        assert batch.tokens.shape[:2] == grid[:2]
        assert_close(others, figures, 1e-6)
        assert_close(grads, whole, 1e-5)


def test_without_reflection_the_pairs_change_nothing():
    params, samples = make_params(LLAMA), make_samples(5, 301, 4)
    none = Objective(reflection="none")
    alone = [Item(s.prompt, s.anchor) for s in samples]
    grads, figures = compute(LLAMA, params, make_batch(samples, 4, none), none)
    others, _ = compute(LLAMA, params, make_batch(alone, 4, none), none)
    assert float(figures["reflection_loss"]) == 0.0
    assert_close(others, grads, 1e-7)


def in_likelihoods(model, samples: list[Item]) -> list[list]:
    """For each sample with a pair: `log p` of every token of anchor and negative, in PyTorch."""
    found = []
    for sample in samples:
        if sample.positive:
            rows = []
            for text in (sample.anchor, sample.negative):
                ids = torch.tensor([[*sample.prompt, *text]])
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
                rows.append(log_p.gather(1, ids[0, 1:, None])[len(sample.prompt) - 1 :, 0])
            found.append(rows)
    return found


@pytest.mark.parametrize("reflection", ["ranking", "dpo"])
def test_likelihood_objectives_equal_those_in_pytorch(reflection, tmp_path):
    config, shared = LLAMA, 5
    params, start = make_params(config), make_params(config, seed=1)
    samples = make_samples(7, config.vocab_size, shared)
    objective = Objective(reflection=reflection, margin=0.3, beta=0.4)
    batch = make_batch(samples, shared, objective)
    reference = start if reflection == "dpo" else None
    grads, figures = compute(config, params, batch, objective, reference)

    model, before = (
        in_torch(config, x, tmp_path / name) for x, name in ((params, "a"), (start, "b"))
    )
    costs = []
    with torch.no_grad():
        then = in_likelihoods(before, samples)
    for now, old in zip(in_likelihoods(model, samples), then, strict=True):
        if reflection == "ranking":
            costs.append(torch.clamp(0.3 - now[0].mean() + now[1].mean(), min=0.0))
        else:
            ratio = (now[0].sum() - old[0].sum()) - (now[1].sum() - old[1].sum())
            costs.append(-torch.nn.functional.logsigmoid(0.4 * ratio))
    lm, _ = in_original(model, samples, False)
    mean = torch.stack(costs).mean()
    (lm + 0.5 * mean).backward()
    assert mean.item() > 0.1
    np.testing.assert_allclose(figures["lm_loss"], lm.item(), rtol=1e-5)
    np.testing.assert_allclose(figures["reflection_loss"], mean.item(), rtol=1e-5)
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    found = dict(in_torch(config, grads, tmp_path / "grads").named_parameters())
    assert_close({name: p.detach().numpy() for name, p in found.items()}, expected, 1e-5)


@pytest.mark.parametrize("reflection", ["triplet", "ranking"])
def test_a_soft_target_costs_what_its_parts_cost_as_hard_ones(reflection):
    rng, params = np.random.default_rng(5), make_params(LLAMA)
    samples = [
        item._replace(others=tuple(((int(rng.integers(301)), rng.random()),) for _ in item.anchor))
        for item in make_samples(8, 301, 4)
    ]
    hard = Objective(reflection=reflection)
    batch = make_batch(samples, 4, Objective(reflection=reflection, alternatives=1))
    grads, figures = compute(LLAMA, params, batch, hard)
    assert batch.others is not None and batch.shares is not None
    share = batch.shares[..., 0]
    plain = batch._replace(others=None, shares=None)
    parts = [
        plain._replace(weights=batch.weights * (1 - share)),
        plain._replace(targets=batch.others[..., 0], weights=batch.weights * share),
    ]
    (first, one), (_, two) = (compute(LLAMA, params, part, hard) for part in parts)
    np.testing.assert_allclose(figures["lm_loss"], one["lm_loss"] + two["lm_loss"], rtol=1e-5)
    np.testing.assert_array_equal(figures["reflection_loss"], one["reflection_loss"])
    still = compute(LLAMA, params, parts[1], Objective(reflection="none"))[0]
    assert_close(grads, jax.tree.map(jnp.add, first, still), 1e-5)


def test_remat_changes_what_is_kept_and_not_the_gradient():
    params, objective = make_params(LLAMA), Objective()
    batch = make_batch(make_samples(6, 301, 4), 4, objective)

    def run(remat: Remat):
        states = bind_states(
            LLAMA, make_mesh(1, 1, 1), compute_dtype=jnp.dtype("float32"), remat=remat
        )
        call = functools.partial(gradients, LLAMA, objective=objective, states=states)
        compiled = jax.jit(call).lower(params, batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return compiled(params, batch)[0], memory.temp_size_in_bytes

    (plain, most), (dots, less), (full, least) = run("none"), run("dots"), run("full")
    assert least < less < most
    assert_close(dots, plain, 1e-6)
    assert_close(full, plain, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerators_are_told_not_to_round_what_is_float32(dtype):
    config, objective = dataclasses.replace(LLAMA, lora=Lora(3, 12.0, ADAPTABLE)), Objective()
    mesh, exact = make_mesh(1, 1, 1), (jax.lax.Precision.HIGHEST,) * 2
    states = bind_states(config, mesh, compute_dtype=jnp.dtype(dtype), remat="dots")
    batch = make_batch(make_samples(1, config.vocab_size, 4), 4, objective)
    call = functools.partial(gradients, config, objective=objective, states=states)
    found: dict[str, set[bool]] = {}
    for equation in equations(jax.make_jaxpr(call)(make_params(config), batch).jaxpr):
        if equation.primitive.name == "dot_general":
            short = any(x.aval.dtype == jnp.bfloat16 for x in equation.invars)
            kind = "bfloat16" if short else "float32"
            found.setdefault(kind, set()).add(equation.params["precision"] == exact)
    assert found.pop("float32") == {True}
    assert found == ({"bfloat16": {False}} if dtype == "bfloat16" else {})


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_eight_devices_take_the_same_steps_as_one(sizes):
    config, objective = LLAMA, Objective()

    def run(mesh, shards: int):
        optimizer = make_optimizer(warmup_schedule(1e-3, 2), 0.01)
        state, step = train(config, objective, mesh, optimizer)
        losses = []
        for index in range(3):
            samples = make_samples(index, config.vocab_size, 4)
            batch = make_batch(samples, 4, objective, Grid(2, shards, 6 // shards + 1))
            state, figures = step(state, put_batch(batch, mesh))
            losses.append(float(figures["loss"]))
            jax.block_until_ready(state)  # fake devices stall when many programs wait at once
        assert step._cache_size() == 1, "the layout of the state changed, and all was compiled anew"
        return state, losses

    one, losses = run(make_mesh(1, 1, 1), 1)
    many, others = run(make_mesh(*sizes), sizes[0] * sizes[1])
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
