"""What a run takes of hardware that is not here, against figures worked out by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill_jax.chips import CHIPS
from distill_jax.config import ConfigError, parse_config
from distill_jax.config_file import override
from distill_jax.layouts import num_weights
from distill_jax.packing import round_up
from distill_jax.plan.fit import find_hardware, fit, nearest, plan_student
from distill_jax.plan.memory import count_exam_memory, count_memory
from distill_jax.plan.page import page_json, page_lines
from distill_jax.plan.teacher import plan_teacher
from distill_jax.plan.work import USUAL, Texts, count_round, make_batch
from distill_jax.student.architecture import Lora, ModelConfig
from distill_jax.student.model import abstract_params

MODEL = ModelConfig(
    vocab_size=512,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_positions=256,
    tied_head=True,
)
TEXTS = Texts(shared=40, prompts=(7, 9, 11, 13), train=100, dev=10, measured=True)
MATRICES = 2 * 32 * 8 * (4 + 2) + 3 * 32 * 64  # of a block


def config(**changes: Any):
    values = {
        "folder": "-",
        "task": {"name": "arithmetic", "num_train": 20},
        "student": {"model": "scratch"},
        "exam": {"max_new_tokens": [30, 20], "samples": 3},
        "teacher": {"max_tokens": 24, "samples": 2},
        "train": {"batch_size": 4, "microbatch_size": 4, "epochs": 2},
        "reflection": {"objective": "none"},
    }
    return parse_config({key: values.get(key, {}) | value if isinstance(value, dict) else value
                         for key, value in {**values, **changes}.items()})  # fmt: skip


def test_a_round_is_counted_by_hand():
    work = count_round(config(), MODEL, TEXTS)
    assert work.rows == 200 and work.steps == 2 * 50
    # A step: what is common but for its last token, four prompts with theirs, four rationales.
    assert work.useful_tokens == 39 + (7 + 9 + 11 + 13 - 4) + 4 * (12 + 1)
    assert work.answers == 110 + 100 * 3
    assert work.answer_tokens == 110 * 15 + 300 * 10
    assert work.prompt_tokens == 2 * 40 + 110 * 10
    tokens = work.prompt_tokens + work.answer_tokens
    products = 3 * MATRICES * tokens + 32 * 512 * work.answer_tokens
    seen = work.prompt_tokens * 50 / 2 + work.answer_tokens * (50 + work.answer_tokens / 410 / 2)
    assert work.exam_flops == pytest.approx(2 * products + 4 * 3 * 4 * 8 * seen)


def test_dpo_takes_a_forward_pass_more():
    def work(objective: str, **student: Any) -> float:
        settings = config(
            reflection={"objective": objective}, student={"model": "scratch", **student}
        )
        model = replace(MODEL, lora=Lora(2, 4.0, ("query",))) if student else MODEL
        return count_round(settings, model, TEXTS).step_flops

    forward = work("dpo") - work("ranking")
    assert forward == pytest.approx(work("ranking") / 3)
    assert work("dpo", lora={"rank": 2}) - work("ranking", lora={"rank": 2}) == forward


def test_the_weights_of_each_device_are_counted_by_hand():
    matrices, norms = 3 * MATRICES + 512 * 32, 3 * 2 * 32 + 32
    assert num_weights(abstract_params(MODEL)) == matrices + norms
    memory = count_memory(config(), MODEL, TEXTS, (2, 2, 2))
    # Every matrix lies on its width over two devices and on its other side over two more.
    each = matrices // 4 + norms
    assert (memory.weights, memory.moments, memory.gradients) == (4 * each, 8 * each, 4 * each)
    assert memory.total == sum(
        (memory.weights, memory.moments, memory.gradients, memory.activations, memory.logits)
    )
    adapted = config(student={"model": "scratch", "lora": {"rank": 2}})
    assert adapted.student.lora is not None


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_activations_are_what_the_backward_pass_needs(remat: str):
    settings = config(train={"remat": remat})
    batch = make_batch(settings, MODEL, TEXTS, shards=1, share=1.0)
    tokens = batch.tokens.shape[-1]
    states = 32 + (2 * 32 + 2 * 16 + 32 + 3 * 64 - 32 if remat == "dots" else 0)
    kept = count_memory(settings, MODEL, TEXTS, (1, 1, 1)).activations
    by_hand = 3 * tokens * states * 2  # of three layers, in bfloat16
    assert kept >= by_hand
    deeper = ModelConfig(**{**vars(MODEL), "layers": 6})
    more = count_memory(settings, deeper, TEXTS, (1, 1, 1)).activations
    assert more - kept == pytest.approx(by_hand, rel=0.35)
    two = count_memory(settings, MODEL, TEXTS, (2, 1, 1)).activations
    assert 0.4 * kept < two < 0.8 * kept


def test_batches_have_the_shapes_of_real_ones():
    batch = make_batch(config(), MODEL, TEXTS, shards=2, share=USUAL)
    assert batch.tokens.shape[:2] == (1, 2)
    assert int(batch.counts.real) == 4
    halves = config(train={"microbatch_size": 2})
    assert make_batch(halves, MODEL, TEXTS, shards=2, share=USUAL).tokens.shape[:2] == (2, 2)
    longest = make_batch(config(), MODEL, TEXTS, shards=4, share=1.0)
    assert longest.tokens.shape[-1] - 10 == round_up(13 - 1 + 25)  # the longest prompt and text
    with pytest.raises(
        ConfigError, match=r"prompts of 307 tokens leave no room in a context of 256"
    ) as refused:
        make_batch(config(), MODEL, Texts(300, (7, 9), 2, 0, True), shards=1, share=1.0)
    advice = re.search(r"set (\S+),", str(refused.value))
    assert advice and "student" not in override(config(), [advice[1]]).task.demonstrations


def test_the_exam_holds_as_many_answers_as_fit():
    chip = CHIPS["v5e"]
    exam = count_exam_memory(config(), MODEL, TEXTS, devices=4, chip=chip)
    assert exam is not None
    assert exam.tensor == 1 and exam.rows == 96  # 400 answers over four, in eights
    assert exam.weights == 2 * num_weights(abstract_params(MODEL))
    wide = ModelConfig(**{**vars(MODEL), "width": 8192, "mlp_width": 65536, "layers": 12})
    large = count_exam_memory(config(), wide, TEXTS, devices=8, chip=chip)
    assert large is not None
    assert large.tensor == 8 and 2 * large.weights * 8 > chip.memory * 4


def test_what_does_not_fit_gets_the_nearest_that_does():
    settings = config(train={"batch_size": 64, "microbatch_size": 64, "remat": "none"})
    student = plan_student(settings)
    small = CHIPS["v5e"]
    whole = count_memory(settings, student.model, student.texts, (1, 1, 1)).total
    chip = type(small)(("x",), 1e12, whole / 1.5, 1e12, 1e9, 2, 1e9)
    assert nearest(settings, student, chip, [1]) == "train.microbatch_size=32"
    tiny = type(small)(("x",), 1e12, 1000.0, 1e12, 1e9, 2, 1e9)
    assert nearest(settings, student, tiny, [1]) == ""


def test_named_hardware():
    assert find_hardware("H200:8") == (CHIPS["h200"], 8)
    assert find_hardware("v5e") == (CHIPS["v5e"], 1)
    for name in ("h300:8", "h100:0", "h100:x"):
        with pytest.raises(ConfigError, match=f"--hardware is one of v4, .*; got '{name}'"):
            find_hardware(name)
    settings = config()
    student = plan_student(settings)
    found = fit(settings, student, "v5e:4")
    assert found.fits and found.name == "4 x v5e" and found.nearest == ""
    assert found.step_seconds == student.round.step_flops / (4 * 197e12)
    assert found.training_seconds == student.round.steps * found.step_seconds
    teacher = plan_teacher(settings)
    page = page_json(teacher, student, [found], [])
    assert json.loads(json.dumps(page))["hardware"][0]["fits"] is True
    assert any(
        "4 x v5e: fits" in line for line in page_lines(settings, teacher, student, [found], [])
    )


def test_a_student_is_known_by_its_config_alone(tmp_path: Path):
    published = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(published))
    student = plan_student(config(student={"model": str(tmp_path)}))
    assert not student.texts.measured and student.model.width == 64
    lines = page_lines(config(), plan_teacher(config()), student, [], [])
    assert any("at 4 bytes a token: it has no tokenizer.json" in line for line in lines)
