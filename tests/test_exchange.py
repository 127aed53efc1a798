"""Students in and out on the command line: any mesh, pickles on request, and the model card."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
import yaml
from fake_devices import fake_devices
from random_models import LLAMA, make_params, make_published, whole
from safetensors.numpy import load_file
from sample_run import HOSTILE, sample_config, write_run

from distill_jax.checkpoint import save_params
from distill_jax.config_file import to_yaml
from distill_jax.exchange import export_round, import_model
from distill_jax.model_card import make_card
from distill_jax.run_folder import write_json
from distill_jax.student.sharding import TRAIN_RULES, make_mesh
from distill_jax.tokenizer import load_tokenizer
from distill_jax.weights import WeightsError, load_params, read_model_config, save_model


def command(*words, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill_jax", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared) -> Path:
    """A finished run whose student of round 3 was saved from eight devices."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "sample")
    config = dataclasses.replace(LLAMA, vocab_size=361, activation="relu")
    tokenizer = load_tokenizer(str(shared / "models" / "babyllama-361"))
    student = folder / "round_00" / "student"
    save_model(student, config, make_params(config), tokenizer, source=None)
    spread = make_params(config, seed=3, mesh=make_mesh(2, 2, 2))
    save_params(folder / "round_03" / "checkpoint", spread)
    return folder


def test_a_round_saved_on_eight_devices_is_exported_on_one(run, tmp_path, shared):
    done = command(
        *("export", run, "--round", 3, "--to", tmp_path / "out", "--json"),
        XLA_FLAGS=fake_devices(1),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "run": str(run),
        "round": 3,
        "directory": str(tmp_path / "out"),
    }
    config = read_model_config(run / "round_00" / "student")
    tokenizer = load_tokenizer(str(shared / "models" / "babyllama-361"))
    save_model(tmp_path / "plain", config, make_params(config, seed=3), tokenizer, source=None)
    exported, plain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain")
    )
    assert exported.keys() == plain.keys()
    assert exported["model.embed_tokens.weight"].shape == (361, 48)
    for name, array in plain.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names


def test_an_exported_directory_is_whole_for_transformers(run, tmp_path):
    pytest.importorskip("torch")
    export_round(run, tmp_path / "out", dtype="bfloat16")  # the chosen round
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(model.dtype) == "torch.bfloat16"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer("Tom has 5", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert said.shape[1] == asked["input_ids"].shape[1] + 3
    exact = make_params(read_model_config(tmp_path / "out"), seed=3)["embedding"]
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored, np.asarray(exact)[:361].astype(ml_dtypes.bfloat16))


def test_rounds_that_are_not_there_and_directories_that_are(run, tmp_path):
    (tmp_path / "kept").write_text("precious")
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        export_round(run, tmp_path)
    with pytest.raises(ValueError, match="has no finished round 2"):
        export_round(run, tmp_path / "out", round_index=2)
    with pytest.raises(ValueError, match="holds no run"):
        export_round(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_where_a_student_comes_from(run):
    card = make_card(run, 3, name="adder")
    front, body = card.removeprefix("---\n").split("---\n", maxsplit=1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "# adder, after round 3" in body
    assert "accuracy was 6.0% (95% interval 2.1 to 16.2) before training and 80.0%" in body
    assert "| test | 3 | 50 | 40 | 80.0% |" in body
    assert "| rounds.max | 4 | 3 |" in body
    assert "| teacher | tutor |" in body
    assert "| 3 | 48 | 450 | 82.5% |" in body
    assert str(run.parent) not in card


def test_nothing_in_the_card_is_more_than_text(tmp_path):
    folder = write_run(tmp_path / "hostile")
    hostile = "|[x](http://evil.example) <script>`$x$`\n# Title --- \x1b[31m"
    config = sample_config(folder, teacher={"model": hostile})
    (folder / "config.yaml").write_text(to_yaml(config))
    write_json(folder / "manifest.json", {"prompt_version": HOSTILE[2], "versions": {"jax": "|"}})
    card = make_card(folder, 1, name="---\nlicense: mit")
    outside = card.split("```")[0::2]  # the question asked stands inside a fence
    assert not any("<script>" in part or "<img" in part or "\x1b" in part for part in outside)
    assert r"| teacher | \|\[x\](http://evil.example) &lt;script&gt;\`\$x\$\` # Title" in card
    assert "# --- license: mit, after round 1" in card
    assert card.count("\n---\n") == 1
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(line.replace(r"\|", "").count("|") in (3, 4, 5, 10) for line in rows)


def pickle(directory: Path, *, shards: int) -> Any:
    """Turns a published directory's safetensors into PyTorch's pickles, half of it in bfloat16."""
    import torch

    file = directory / "model.safetensors"
    state = {name: torch.from_numpy(array.copy()) for name, array in load_file(file).items()}
    file.unlink()
    for name in list(state)[::2]:
        state[name] = state[name].bfloat16()
    names = list(state)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        files = ["pytorch_model.bin"]
    else:
        placed = {name: f for f, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": placed}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, part in zip(files, parts, strict=True):
        torch.save({key: state[key] for key in part}, directory / name)
    return state


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_read_when_asked_for(tmp_path, shared, shards):
    source = tmp_path / "source"
    make_published(source, "gpt-neox")
    load_tokenizer(str(shared / "models" / "babyllama-361")).save(source)
    state = pickle(source, shards=shards)
    config = read_model_config(source, pickled=True)
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors.*import MODEL --pickled"):
        load_params(source, config, whole(config))
    import_model(str(source), tmp_path / "new", pickled=True)
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor.float().numpy(), err_msg=name)
    again = whole(config, make_mesh(1, 2, 2), TRAIN_RULES)
    load_params(tmp_path / "new", read_model_config(tmp_path / "new"), again)


def test_pickles_that_hold_more_than_arrays_are_refused(tmp_path, shared):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    make_published(source, "gpt2")
    pickle(source, shards=1)
    file, config = source / "pytorch_model.bin", read_model_config(source, pickled=True)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    whole_file = file.read_bytes()
    for content in (Evil(), {"lm_head.weight": Evil()}, {"steps": 3}, [torch.zeros(2)]):
        torch.save(content, file)
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin (can't be read|holds some)"):
            load_params(source, config, whole(config), pickled=True)
    assert not (tmp_path / "ran").exists()
    file.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin can't be read as weights alone"):
        load_params(source, config, whole(config), pickled=True)


def test_without_torch_pickles_are_refused_in_one_sentence(tmp_path, monkeypatch):
    make_published(tmp_path, "gpt2")
    pickle(tmp_path, shards=1)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "distill_jax.families.pickled", raising=False)
    with pytest.raises(WeightsError, match=r"not installed; install it with: pip install 'dist"):
        read_model_config(tmp_path, pickled=True)
