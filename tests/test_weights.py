"""Published models in and out: real ones, random ones, broken ones."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from random_models import (
    LLAMA,
    PUBLISHED,
    make_params,
    make_published,
    make_rows,
    published_logits,
    run,
    variant,
    whole,
)
from safetensors.numpy import load_file, save_file

from distill_jax.families import arrays
from distill_jax.families.config_json import find_family_for
from distill_jax.families.layout import Placement
from distill_jax.student.model import logits
from distill_jax.student.sharding import EXAM_RULES, TRAIN_RULES, make_mesh
from distill_jax.tokenizer import load_tokenizer
from distill_jax.weights import WeightsError, find_model, load_params, read_model_config, save_model

REAL = ["stories260k", "babyllama-361", "mathgpt-add3"]


def read(directory):
    config = read_model_config(directory)
    return config, load_params(directory, config, whole(config))


def copy(source, target):
    """A copy that may be changed."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def change_config(directory, **changes):
    file = directory / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def change_arrays(directory, change):
    file = directory / "model.safetensors"
    loaded = load_file(file)
    change(loaded)
    save_file(loaded, file, metadata={"format": "pt"})


def assert_same_params(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", REAL)
def test_real_models_go_in_and_out_exactly(shared, tmp_path, name):
    torch = pytest.importorskip("torch")
    source = shared / "models" / name
    config, params = read(source)
    rows = make_rows([9, 5, 7], vocab_size=config.vocab_size)
    published = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scores, _ = published_logits(published.eval(), *rows)
    hidden, _ = run(config, params, *rows)
    ours = np.asarray(logits(config, params, hidden))[..., : config.vocab_size]
    assert np.abs(ours - scores)[rows[2]].max() < 1e-4

    out = tmp_path / "out"
    save_model(out, config, params, load_tokenizer(str(source)), source=source)
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert back.dtype == torch.float32
    expected, found = published.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    stored, written = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert stored.keys() == written.keys()
    for field in ("tie_word_embeddings", "vocab_size", "eos_token_id", "bos_token_id"):
        assert getattr(back.config, field) == getattr(published.config, field)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").is_file()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_goes_in_and_out_exactly_on_any_mesh(name, tmp_path, shared):
    source, out = tmp_path / "source", tmp_path / "out"
    published = make_published(source, name)
    config, expected = read(source)
    for sizes, rules in (
        ((2, 2, 2), TRAIN_RULES),
        ((1, 1, 8), EXAM_RULES),
        ((1, 4, 2), TRAIN_RULES),
    ):
        mesh = make_mesh(*sizes)
        params = load_params(source, config, whole(config, mesh, rules))
        assert_same_params(params, expected)
    assert params["embedding"].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")

    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    save_model(out, config, params, tokenizer, source=source)
    stored, written = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {
        k: (v.shape, v.dtype) for k, v in stored.items()
    }
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    found, wanted = back.state_dict(), published.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    said = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "llama", "opt-350m"])
@pytest.mark.parametrize("stretch_bytes", [1, 400, 2**23])
def test_every_number_of_a_file_is_read_once(name, stretch_bytes, tmp_path, monkeypatch):
    """Also where three of ours share an array, and where two devices keep the same part."""
    make_published(tmp_path, name)
    config = read_model_config(tmp_path)
    expected = load_params(tmp_path, config, whole(config))
    times: dict[int, np.ndarray] = {}
    view = Placement.view

    def count(place, array, wanted):
        seen = times.setdefault(array.offset, np.zeros(array.shape, int))
        view(place, seen, wanted)[...] += 1
        return view(place, array, wanted)

    monkeypatch.setattr(Placement, "view", count)
    monkeypatch.setattr(arrays, "STRETCH_BYTES", stretch_bytes)
    spread = whole(config, make_mesh(2, 2, 2), TRAIN_RULES)
    assert_same_params(load_params(tmp_path, config, spread), expected)
    assert all((seen == 1).all() for seen in times.values())
    assert len(times) == len(load_file(tmp_path / "model.safetensors"))


def test_rows_that_pad_the_vocabulary_are_zero_and_stay_here(tmp_path, shared):
    source = shared / "models" / "babyllama-361"
    config, params = read(source)
    assert params["embedding"].shape == (384, 128)
    assert not np.asarray(params["embedding"][361:]).any()
    save_model(tmp_path / "out", config, params, load_tokenizer(str(source)), source=source)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.embed_tokens.weight"].shape == (361, 128)


def test_a_model_of_our_own_is_written_as_llama(tmp_path, shared):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(LLAMA, activation="relu", tied_head=True, vocab_size=361)
    assert find_family_for(config).architecture == "LlamaForCausalLM"
    assert find_family_for(variant("gpt2")).architecture == "GPT2LMHeadModel"
    params = make_params(config)
    tokenizer = load_tokenizer(str(shared / "models" / "babyllama-361"))
    save_model(tmp_path / "own", config, params, tokenizer, source=None)
    assert read_model_config(tmp_path / "own") == config
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    assert (back.config.bos_token_id, back.config.eos_token_id) == (1, 2)
    rows = make_rows([6, 4], vocab_size=361)
    scores, _ = published_logits(back.eval(), *rows)
    hidden, _ = run(config, params, *rows)
    ours = np.asarray(logits(config, params, hidden))[..., :361]
    assert np.abs(ours - scores)[rows[2]].max() < 1e-4
    again = load_tokenizer(str(tmp_path / "own"))
    assert again.encode_prompt("Tom has 5") == tokenizer.encode_prompt("Tom has 5")
    with pytest.raises(ValueError, match=r"no family of .* can hold"):
        find_family_for(dataclasses.replace(config, norm="layer"))


def test_several_files_are_one_model(tmp_path, monkeypatch, shared):
    source = shared / "models" / "mathgpt-add3"
    config, params = read(source)
    monkeypatch.setattr(arrays, "FILE_BYTES", 10**6)
    out = tmp_path / "out"
    save_model(out, config, params, load_tokenizer(str(source)), source=source)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert all((out / file).stat().st_size < 10**6 + 10**4 for file in files)
    assert_same_params(load_params(out, config, whole(config)), params)
    if pytest.importorskip("torch"):
        transformers.GPT2LMHeadModel.from_pretrained(out)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32(tmp_path, shared, kind):
    directory = copy(shared / "models" / "stories260k", tmp_path / "half")
    stored = load_file(directory / "model.safetensors")
    save_file({k: v.astype(kind) for k, v in stored.items()}, directory / "model.safetensors")
    _, params = read(directory)
    assert params["embedding"].dtype == np.float32
    rounded = stored["model.embed_tokens.weight"].astype(kind).astype(np.float32)
    np.testing.assert_array_equal(params["embedding"], rounded)


def test_old_gpt2_files_without_prefix_and_with_masks(tmp_path, shared):
    directory = copy(shared / "models" / "mathgpt-add3", tmp_path / "old")
    _, expected = read(directory)

    def age(stored):
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)
        for layer in range(4):
            stored[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), bool))
            stored[f"h.{layer}.attn.masked_bias"] = np.full((1,), -1e4, np.float32)

    change_arrays(directory, age)
    assert_same_params(read(directory)[1], expected)


def test_one_report_lists_all_that_is_wrong(tmp_path, shared):
    directory = copy(shared / "models" / "stories260k", tmp_path / "broken")

    def spoil(stored):
        del stored["model.norm.weight"], stored["model.layers.3.mlp.up_proj.weight"]
        stored["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
        stored["model.layers.0.self_attn.k_proj.weight"] = np.zeros((64, 64), np.float32)
        stored["model.layers.1.mlp.down_proj.weight"] = np.zeros((64, 172), np.int32)

    change_arrays(directory, spoil)
    with pytest.raises(WeightsError) as caught:
        read(directory)
    assert str(caught.value).splitlines() == [
        f"the weights in {directory} do not fit its config:",
        "  misshapen: model.layers.0.self_attn.k_proj.weight is [64, 64], expected [32, 64]",
        "  missing: model.layers.3.mlp.up_proj.weight [172, 64]",
        "  not a float: model.layers.1.mlp.down_proj.weight holds I32",
        "  missing: model.norm.weight [64]",
        "  unexpected: model.layers.9.mlp.up_proj.weight [2, 3]",
    ]


def test_a_head_that_differs_from_the_embedding_is_used(tmp_path, shared):
    directory = copy(shared / "models" / "mathgpt-add3", tmp_path / "wrong")
    change_config(directory, tie_word_embeddings=True)
    config, params = read(directory)
    assert not config.tied_head
    assert not np.array_equal(params["head"], params["embedding"])

    def tie(stored):
        stored["lm_head.weight"] = stored["transformer.wte.weight"].copy()

    change_arrays(directory, tie)
    config, params = read(directory)
    assert config.tied_head
    assert "head" not in params


def test_broken_directories_are_refused_by_name(tmp_path, shared):
    source = shared / "models" / "stories260k"
    cut = copy(source, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"cut/model\.safetensors is cut short or corrupt"):
        read(cut)
    weights.write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match=r"cut/model\.safetensors is cut short or corrupt"):
        read(cut)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"cut holds no model\.safetensors"):
        read(cut)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"cut holds no model-00001-of-00002\.safetensors"):
        read(cut)
    (cut / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"index\.json has no weight_map that names files"):
        read(cut)
    (cut / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        read(cut)
    with pytest.raises(WeightsError, match=r"holds no config\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM is not known; known: LlamaForCausalLM, GPT2LMHeadModel, GPTNeoFor",
        ),
        ({"architectures": ..., "model_type": "mamba"}, "architecture mamba is not known"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            r"rope_type must be 'default', 'linear' or 'llama3'; got 'yarn'",
        ),
        ({"hidden_act": "quick_gelu"}, "activation is one of .* got 'quick_gelu'"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, shared, changes, sentence):
    directory = copy(shared / "models" / "stories260k", tmp_path / "other")
    change_config(directory, **changes)
    with pytest.raises(WeightsError, match=sentence):
        read_model_config(directory)


def test_absent_keys_mean_what_transformers_means(tmp_path, shared):
    directory = copy(shared / "models" / "stories260k", tmp_path / "short")
    change_config(directory, num_key_value_heads=..., rope_theta=..., tie_word_embeddings=...)
    change_config(directory, rms_norm_eps=..., architectures=...)
    config = read_model_config(directory)
    published = transformers.AutoConfig.from_pretrained(directory)
    assert config.kv_heads == published.num_key_value_heads == 8
    assert config.norm_epsilon == published.rms_norm_eps
    assert config.rope_theta == published.rope_parameters["rope_theta"]
    assert config.tied_head == published.tie_word_embeddings


def test_nothing_is_written_over(tmp_path, shared):
    source = shared / "models" / "mathgpt-add3"
    config, params = read(source)
    (tmp_path / "kept").write_text("precious")
    with pytest.raises(WeightsError, match="is not empty; name a new directory"):
        save_model(tmp_path, config, params, load_tokenizer(str(source)), source=source)


def test_models_that_are_nowhere(tmp_path):
    assert find_model(str(tmp_path)) == tmp_path
    for name in (str(tmp_path / "none"), "./none", "~/none/at/all", "a/b/c"):
        with pytest.raises(WeightsError, match="is not a directory; give one that holds config"):
            find_model(name)
    with pytest.raises(WeightsError, match=r"not a directory here, and .* hub can't be reached"):
        find_model("nobody/nothing-at-all")
    with pytest.raises(WeightsError, match="neither a directory here nor a model"):
        find_model("two words")
