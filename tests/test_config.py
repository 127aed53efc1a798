"""Settings: what is wrong gets one sentence, and nothing is written."""

from pathlib import Path

import pytest
import yaml

from distill_jax.config import Config, ConfigError, knobs, parse_config
from distill_jax.config_file import differences, load_config, override, to_yaml

SMALL = {"folder": "runs/a", "task": {"name": "gsm8k"}, "student": {"model": "m"}}


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": {"epohcs": 3}}, "train.epohcs is not a knob; did you mean train.epochs?"),
        ({"sead": 1}, "sead is not a knob; did you mean seed?"),
        ({"train": {"epochs": "x"}}, "train.epochs: input should be a valid integer; got 'x'."),
        ({"train": {"epochs": 2.5}}, "train.epochs: input should be a valid integer; got 2.5."),
        ({"reflection": {"prefix_gradient": 1}}, "should be a valid boolean; got 1."),
        ({"train": 5}, "train: input should be a valid dictionary"),
        ({"exam": {"top_p": 0}}, "exam.top_p: input should be greater than 0; got 0."),
        (
            {"reflection": {"objective": "trplet"}},
            "should be 'triplet', 'ranking', 'dpo' or 'none'; got 'trplet'.",
        ),
        ({"task": {"name": "gms8k"}}, "got 'gms8k'; did you mean gsm8k?"),
        ({"task": {"name": "arithmetic"}}, "task.num_train says how many arithmetic questions"),
        ({"train": {"microbatch_size": 5}}, "must divide train.batch_size (16); got 5."),
        ({"mesh": {"tensor": 0}}, "mesh axes are at least 1"),
        ({"exam": {"samples": 0}}, "set exam.samples to 1 or more"),
        ({"teacher": {"url": "https://api.example.com/v1"}}, "teacher.price_usd is needed"),
        ({"teacher": {"price_usd": [1.0, 2.0]}}, "teacher.budget_usd is the most this run may"),
        ({"student": {"model": "scratch"}}, "makes a student that reads arithmetic only"),
        ({"student": {}}, "student.model is missing; it has no default."),
        ({"train": {"learning_rates": []}}, "at least 1 item after validation, not 0; got"),
    ],
)
def test_what_is_wrong_gets_one_sentence(change: dict, sentence: str):
    with pytest.raises(ConfigError) as error:
        parse_config({**SMALL, **change})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_are_the_papers_but_for_the_weight_of_reflection():
    config = parse_config(SMALL)
    assert (config.train.epochs, config.train.batch_size) == (10, 16)
    assert config.train.learning_rates == (1e-6, 7e-7)
    assert (config.reflection.weight, config.reflection.margin) == (0.1, 1.0)
    assert (config.exam.samples, config.exam.top_k, config.teacher.top_p) == (4, 50, 0.9)
    assert (config.train.rows, config.train.start, config.seed) == (("new",), "previous", 42)


def test_overrides_win_over_the_file_and_it_over_what_it_extends(tmp_path: Path):
    write(tmp_path / "base.yaml", {**SMALL, "seed": 1, "train": {"epochs": 3, "batch_size": 8}})
    (tmp_path / "sub").mkdir()
    child = {"extends": "../base.yaml", "train": {"epochs": 4, "microbatch_size": 8}}
    path = write(tmp_path / "sub" / "child.yaml", child)
    config = load_config(
        path, ["train.epochs=5", "train.learning_rates=[1e-5, 2e-5]", "teacher=tutor"]
    )
    assert (config.seed, config.train.batch_size, config.train.epochs) == (1, 8, 5)
    assert config.train.learning_rates == (1e-5, 2e-5)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs", "an override is written key.sub=value; got 'train.epochs'."),
        ("train.epochs=[", "the value of 'train.epochs=[' is not YAML."),
        ("train.epoch=3", "train.epoch is not a knob; did you mean train.epochs?"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[").replace("?", r"\?")):
        load_config(write(tmp_path / "c.yaml", SMALL), [override])


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml can't be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"must hold keys and values; got \[1\]"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken.yaml is not YAML"):
        load_config(tmp_path / "broken.yaml")
    loop = write(tmp_path / "loop.yaml", {"extends": "loop.yaml"})
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(loop)


def test_the_resolved_config_reads_back_equal(tmp_path: Path):
    config = parse_config(
        {**SMALL, "train": {"learning_rates": [1e-5]}, "task": {"name": "a.jsonl"}}
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "c.yaml")
    assert again == config and differences(config, again) == []
    assert differences(config, override(config, ["seed=7"])) == ["seed: 42 -> 7"]


def test_there_are_fewer_than_sixty_knobs():
    names = list(knobs())
    assert len(names) == len(set(names)) < 60
    assert {name.split(".")[0] for name in names} == set(Config.model_fields)
