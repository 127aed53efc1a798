"""What a run says when a device has no memory left."""

import re
from dataclasses import asdict
from pathlib import Path

import jax
import pytest
from random_models import LLAMA

from distill_jax.config import Config, ConfigError, parse_config
from distill_jax.config_file import override
from distill_jax.plan.memory import count_memory
from distill_jax.plan.savings import OutOfMemory, explained, save_in_training
from distill_jax.plan.work import Texts
from distill_jax.run_folder import ANOTHER_FOLDER, open_run
from distill_jax.student.sharding import make_mesh

TEXTS = Texts(shared=9, prompts=(20, 30, 12, 25), train=4, dev=1, measured=True)


def make_config(*overrides: str) -> Config:
    values = {
        "folder": "runs/x",
        "task": {"name": "gsm8k"},
        "student": {"model": "m", "compute_dtype": "float32"},
        "train": {"batch_size": 4, "microbatch_size": 4},
        "teacher": {"max_tokens": 16},
    }
    return override(parse_config(values), overrides)


def test_the_message_names_each_setting_and_what_it_saves():
    config = make_config()
    message = save_in_training(config, LLAMA, TEXTS, make_mesh(1, 1, 1))
    total = count_memory(config, LLAMA, TEXTS, (1, 1, 1))
    found = dict(re.findall(r"(\S+=\S+)(?: on as many devices)? saves ([0-9.]+) MB", message))
    changes = ["train.microbatch_size=2", "train.remat=full", "student.compute_dtype=bfloat16"]
    assert sorted(found) == sorted([*changes, "mesh.fsdp=2"])
    for change in changes:
        less = count_memory(override(config, [change]), LLAMA, TEXTS, (1, 1, 1)).total
        assert float(found[change]) == pytest.approx((total.total - less) / 1e6, abs=0.006)
    assert f"takes {total.total / 1e6:,.2f} MB" in message
    assert all(name in message for name in asdict(total))


def test_a_run_goes_on_with_what_is_named_or_the_message_says_where_to_go(tmp_path: Path):
    config = make_config(f"folder={tmp_path / 'run'}")
    message = save_in_training(config, LLAMA, TEXTS, make_mesh(1, 1, 1))
    open_run(config)
    for change in re.findall(r"(\S+=\S+)(?: on as many devices)? saves", message):
        if change in message.split("run again.")[1]:
            with pytest.raises(ConfigError, match=re.escape(ANOTHER_FOLDER)):
                open_run(override(config, [change]))
            assert message.endswith(f" For {change} {ANOTHER_FOLDER}.")
        else:
            open_run(override(config, [change]))


def test_a_setting_that_is_as_low_as_it_goes_is_not_offered():
    config = make_config(
        "train.microbatch_size=1", "train.remat=full", "student.compute_dtype=bfloat16"
    )
    message = save_in_training(config, LLAMA, TEXTS, make_mesh(1, 1, 1))
    assert "microbatch" not in message and "remat" not in message and "dtype" not in message


def test_only_a_lack_of_memory_is_explained():
    with (
        pytest.raises(OutOfMemory, match=r"^a device ran out of memory\. Lower it\.$"),
        explained(lambda: "Lower it."),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), explained(lambda: ""):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: something else")
