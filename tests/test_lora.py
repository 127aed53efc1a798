"""Low-rank adapters: what they compute, what is trained, and where they go."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import yaml
from random_models import make_params, make_published, make_rows, run, variant, whole
from samples import make_batch, make_samples
from test_model import equations
from test_rounds import SMALL

from distill_jax.adapters import save_adapters
from distill_jax.checkpoint import load_params as load_checkpoint
from distill_jax.config_file import load_config
from distill_jax.packing import Grid
from distill_jax.run_folder import read_rows
from distill_jax.school import Weights, open_weights
from distill_jax.student.architecture import ADAPTABLE, Lora
from distill_jax.student.lora import init_adapters, join, merge, split
from distill_jax.student.model import abstract_params, logical_axes, logits
from distill_jax.student.objective import Objective
from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
from distill_jax.student.step import (
    bind_states,
    gradients,
    init_state,
    make_optimizer,
    make_step,
    put_batch,
    warmup_schedule,
)
from distill_jax.tokenizer import load_tokenizer
from distill_jax.weights import load_params, save_model

ALL = tuple(name for name in ADAPTABLE if name != "gate")
GPT2 = dataclasses.replace(variant("gpt2"), lora=Lora(3, 12.0, ALL))
LLAMA = dataclasses.replace(variant("llama"), lora=Lora(3, 12.0, ADAPTABLE))


def dense(config, params):
    """W + scale * A B for every matrix, written out by hand."""
    assert config.lora is not None
    adapters, plain = split(params)
    plain = jax.tree.map(lambda x: x, plain)
    products = {
        "query": "lir,lrnh->linh",
        "key": "lir,lrnh->linh",
        "value": "lir,lrnh->linh",
        "out": "lnhr,lro->lnho",
        "up": "lir,lro->lio",
        "gate": "lir,lro->lio",
        "down": "lir,lro->lio",
    }
    for part, inner in adapters["blocks"].items():
        for name, pair in inner.items():
            matrix = name.removesuffix("_adapter")
            added = jnp.einsum(products[matrix], pair["a"], pair["b"])
            plain["blocks"][part][matrix] += config.lora.alpha / config.lora.rank * added
    return plain


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_adapters_compute_what_the_sum_of_matrices_does(config):
    params, rows = make_params(config), make_rows([9, 5, 7], vocab_size=config.vocab_size)
    hidden, _ = run(config, params, *rows)
    expected, _ = run(config.plain, dense(config, params), *rows)
    base, _ = run(config.plain, split(params)[1], *rows)
    assert np.abs(np.asarray(base) - np.asarray(hidden))[rows[2]].max() > 0.1
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    merged, _ = run(config.plain, merge(config, params), *rows)
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_accelerators_merge_without_rounding():
    merged = jax.make_jaxpr(functools.partial(merge, LLAMA))(make_params(LLAMA))
    products = [x for x in equations(merged.jaxpr) if x.primitive.name == "dot_general"]
    assert len(products) == len(ADAPTABLE)
    assert {x.params["precision"] for x in products} == {(jax.lax.Precision.HIGHEST,) * 2}


def states(config, mesh):
    return bind_states(config, mesh, compute_dtype=jnp.dtype("float32"), remat="none")


@pytest.mark.parametrize("reflection", ["triplet", "dpo"])
def test_only_adapters_have_gradients_and_these_are_those_of_the_sum(reflection):
    config, mesh, objective = LLAMA, make_mesh(1, 1, 1), Objective(reflection=reflection)
    adapters, base = split(make_params(config))
    before = jax.tree.map(lambda x: 0.9 * x, adapters) if reflection == "dpo" else None
    batch = make_batch(make_samples(1, config.vocab_size, 5), 5, objective)
    call = functools.partial(gradients, objective=objective)
    grads, figures = jax.jit(functools.partial(call, config, states=states(config, mesh)))(
        adapters, batch, frozen=base, reference=before
    )

    def plain(adapters, batch):
        whole = dense(config, join(adapters, base))
        then = None if before is None else dense(config, join(before, base))
        pull, figures = call(
            config.plain, whole, batch, reference=then, states=states(config.plain, mesh)
        )
        dot = jax.tree.map(lambda g, w: jnp.vdot(jax.lax.stop_gradient(g), w), pull, whole)
        return sum(jax.tree.leaves(dot)), figures

    expected, others = jax.jit(jax.grad(plain, has_aux=True))(adapters, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    np.testing.assert_allclose(figures["loss"], others["loss"], rtol=1e-5)
    for ours, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.abs(wanted).max() > 0
        assert np.abs(np.asarray(ours) - wanted).max() < 1e-5 * max(np.abs(wanted).max(), 1e-2)


def test_four_devices_take_the_steps_of_one_and_nothing_else_has_moments():
    config, objective = LLAMA, Objective()

    def train(mesh, shards):
        adapters, base = split(make_params(config, mesh=mesh))
        optimizer = make_optimizer(warmup_schedule(1e-3, 0), 0.01)
        state, layout = init_state(adapters, optimizer, mesh)
        step = make_step(
            config,
            optimizer,
            objective,
            mesh=mesh,
            state_shardings=layout,
            compute_dtype=jnp.dtype("float32"),
            remat="none",
        )
        for index in range(2):
            samples = make_samples(index, config.vocab_size, 4)
            batch = make_batch(samples, 4, objective, Grid(1, shards, 6))
            state, figures = step(state, put_batch(batch, mesh), base)
            jax.block_until_ready(state)
        return state, float(figures["loss"])

    one, loss = train(make_mesh(1, 1, 1), 1)
    many, other = train(make_mesh(1, 2, 2), 2)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(split(abstract_params(config))[0]))
    assert sum(leaf.size for leaf in jax.tree.leaves(one.params)) == sizes
    assert sum(leaf.size for leaf in jax.tree.leaves(one.opt_state)) < 2 * sizes + 4
    for x, y in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", ("query", "value", "out", "up")),
        ("gpt2", ALL),
        ("gpt-neox", ("query", "key", "value", "down")),
        ("gptj", ("query", "value")),
        ("llama", ADAPTABLE),
    ],
)
def test_adapters_and_merged_weights_load_elsewhere_with_the_same_scores(
    name, targets, tmp_path, shared
):
    torch = pytest.importorskip("torch")
    base, merged = tmp_path / "base", tmp_path / "merged"
    published = make_published(base, name)
    config = dataclasses.replace(variant(name), lora=Lora(3, 12.0, targets))
    adapters = split(make_params(config))[0]
    params = join(adapters, load_params(base, config.plain, whole(config.plain)))
    rows = make_rows([9, 5, 7], vocab_size=config.vocab_size)
    hidden, _ = run(config, params, *rows)
    ours = np.asarray(logits(config, params, hidden))[..., : config.vocab_size]

    def scores(model):
        tokens, _, mask = map(torch.tensor, rows)
        with torch.no_grad():
            return model.eval()(tokens, attention_mask=mask.long()).logits.numpy()

    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    save_model(merged, config.plain, merge(config, params), tokenizer, source=base)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert np.abs(scores(model) - scores(published))[rows[2]].max() > 0.1
    assert np.abs(scores(model) - ours)[rows[2]].max() < 1e-4

    save_adapters(tmp_path / "adapters", config, adapters, base=base)
    peft = pytest.importorskip("peft", reason="the reference for adapters in files")
    with_adapters = peft.PeftModel.from_pretrained(published, tmp_path / "adapters")
    assert np.abs(scores(with_adapters) - ours)[rows[2]].max() < 1e-4


def test_new_adapters_add_nothing_and_depend_on_the_seed_alone():
    def make(seed, *sizes):
        layout = shardings(
            make_mesh(*sizes), logical_axes(LLAMA), abstract_params(LLAMA), TRAIN_RULES
        )
        return init_adapters(LLAMA, jax.random.key(seed), layout)

    one, many, other = make(1, 1, 1, 1), make(1, 2, 2, 2), make(2, 1, 1, 1)
    assert jax.tree.structure(one) == jax.tree.structure(split(abstract_params(LLAMA))[0])
    pair = one["blocks"]["mlp"]["up_adapter"]
    assert not np.asarray(pair["b"]).any() and np.asarray(pair["a"]).std() > 0.1
    np.testing.assert_allclose(many["blocks"]["mlp"]["up_adapter"]["a"], pair["a"], atol=1e-6)
    assert not np.allclose(other["blocks"]["mlp"]["up_adapter"]["a"], pair["a"])


def test_a_matrix_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="asked for on gate, but no matrix gates this MLP"):
        dataclasses.replace(variant("gpt2"), lora=Lora(3, 12.0, ("query", "gate")))


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "distill_jax", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_two_rounds_leave_the_base_as_it_was(tmp_path):
    file, folder = tmp_path / "small.yaml", tmp_path / "run"
    student = SMALL["student"] | {"lora": {"rank": 4, "targets": ["query", "value", "down"]}}
    values = SMALL | {"folder": str(folder), "student": student}
    values["scratch"] = [16, 2, 4]
    file.write_text(yaml.safe_dump(values))
    command("run", file, "mesh.fsdp=2", "mesh.tensor=2")
    assert json.loads((folder / "result.json").read_text())["rounds"] == 2
    base = folder / "round_00" / "student"
    found = open_weights(load_config(folder / "config.yaml"), folder, base, make_mesh(1, 1, 1))
    assert isinstance(found, Weights) and found.model.lora is not None
    untrained, adapters = found.get(0), [found.get_adapters(r) for r in (0, 1, 2)]
    trained = split(found.get(2))[1]
    for round_index in (1, 2):
        assert read_rows(folder / f"round_0{round_index}" / "metrics.jsonl")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), adapters[0]
        )
        load_checkpoint(folder / f"round_0{round_index}" / "checkpoint", like)  # no other weights
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, x), y in zip(
            jax.tree.leaves_with_path(trained), jax.tree.leaves(untrained), strict=True
        )
        if not np.array_equal(x, y)
    }
    assert changed == {
        "blocks.attention.query",
        "blocks.attention.value",
        "blocks.mlp.down",
    }
    b = [x["blocks"]["mlp"]["down_adapter"]["b"] for x in adapters]
    assert not np.asarray(b[0]).any() and np.asarray(b[1]).any()
    assert not np.array_equal(b[1], b[2])

    command("export", folder, "--round", 2, "--to", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    down = model.state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(down.T, trained["blocks"]["mlp"]["down"][0])
    command("export", folder, "--round", 2, "--to", tmp_path / "alone", "--adapters")
    assert {x.name for x in (tmp_path / "alone").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
