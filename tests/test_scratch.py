"""The student made from nothing: its tokenizer, its text, and what is written to disk."""

import re
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import find_rows

from distill_jax import scratch
from distill_jax.config import Config, TutorConfig, parse_config
from distill_jax.packing import make_grid, pack, plan_shapes
from distill_jax.progress import Progress
from distill_jax.prompts import (
    clean_rationale,
    exam_prompt,
    feedback_prompt,
    mistake_target,
    target,
)
from distill_jax.questions.arithmetic import make_questions
from distill_jax.records import Question
from distill_jax.student.model import abstract_params, logical_axes
from distill_jax.student.sharding import EXAM_RULES, make_mesh, shardings
from distill_jax.teacher.tutor import Tutor
from distill_jax.tokenizer import Tokenizer, load_tokenizer
from distill_jax.weights import load_params, read_model_config

TOKENIZER = scratch.make_tokenizer()
BACKEND = TOKENIZER.backend_tokenizer
UNKNOWN = BACKEND.token_to_id(scratch.UNKNOWN)


def questions(number: int = 200, **changes) -> list[Question]:
    asked = {"num_test": 0, "steps": (2, 3, 4), "max_value": 30, "seed": 11} | changes
    return make_questions(num_train=number, **asked)


def stories(seed: int = 0, **changes) -> list[scratch.Document]:
    drawn = {"max_value": 30, "exam_texts": set()} | changes
    return list(islice(scratch.draw_stories(Random(seed), **drawn), 3000))


def cards(seed: int = 0) -> list[scratch.Document]:
    return list(islice(scratch.draw_cards(Random(seed), max_value=30), 1000))


def tiny() -> Config:
    return parse_config(
        {
            "folder": "unused",
            "seed": 4,
            "task": {"name": "arithmetic", "num_train": 60},
            "student": {"model": "scratch", "compute_dtype": "float32"},
            "scratch": (16, 1, 3),
        }
    )


def assert_known_and_lossless(text: str) -> None:
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert UNKNOWN not in ids, [BACKEND.id_to_token(i) for i in ids]
    assert BACKEND.decode(ids) == text


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("wrong_rate", [0.0, 1.0])
def test_every_word_of_the_tutor_is_known(feedback: bool, wrong_rate: float):
    """Right and wrong answers, with and without a mistake shown."""
    rates = TutorConfig(wrong_rates=(wrong_rate, wrong_rate))
    asked = questions(200)
    wrong = Tutor(asked, tutor=TutorConfig(wrong_rates=(1.0, 1.0)), seed=1)
    tutor = Tutor(asked, tutor=rates, seed=0)
    tips = 0
    for question in asked:
        plain = feedback_prompt(question, mistake=None, hint=True, demonstrations="")
        prompt = plain
        if feedback:
            mistake = (wrong.answer(plain, samples=1) or [""])[0]
            prompt = feedback_prompt(question, mistake=mistake, hint=True, demonstrations="")
        answers = tutor.answer(prompt, samples=4)
        assert answers is not None
        for answer in answers:
            tips += "wrong" in answer
            assert_known_and_lossless(
                exam_prompt(question, demonstrations="") + target(question, clean_rationale(answer))
            )
            assert_known_and_lossless(mistake_target(answer))
    assert bool(tips) == feedback


def test_every_document_is_known_and_lossless():
    for document in (*stories(), *cards()):
        assert_known_and_lossless(document.prompt + document.target)


@given(st.integers(0, 10**12))
@settings(deadline=None)
def test_every_number_is_given_back(number: int):
    text = f"Answer: {number}"
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert BACKEND.decode(ids) == text
    assert UNKNOWN not in ids
    assert number > 99 or len(ids) == 3


def test_saved_and_loaded_like_a_published_tokenizer(tmp_path: Path):
    Tokenizer(TOKENIZER).save(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    question = questions(1)[0]
    prompt = exam_prompt(question, demonstrations="")
    answer = target(question, question.solution)
    ids, following = tokenizer.encode_prompt(prompt), tokenizer.encode_target(prompt, answer)
    assert ids[0] == tokenizer.begin_id == BACKEND.token_to_id(scratch.BEGIN)
    assert following[-1] == tokenizer.end_id == BACKEND.token_to_id(scratch.END)
    assert tokenizer.decode(ids[1:]) == prompt
    assert tokenizer.decode(following[:-1]) == answer
    assert tokenizer.num_tokens == len(TOKENIZER)
    newline = BACKEND.token_to_id("\n")
    assert list(np.flatnonzero(tokenizer.newlines)) == [newline]


def is_retold(document: scratch.Document) -> bool:
    return "Tell this story again. " in document.prompt


def test_stories_are_solved_and_retold_in_the_stated_parts():
    solved = sum(not is_retold(document) for document in stories()) / 3000
    assert abs(solved - scratch.ONE_STEP) < 0.03  # three standard deviations are 0.027


def test_no_story_is_solved_that_has_more_than_one_step():
    for document in stories():
        if is_retold(document):
            assert "=" not in document.target
            continue
        equations = re.findall(r"\d+ [-+*] \d+ = \d+", document.target.split("The first wrong")[0])
        assert len(equations) == 1
        assert len(re.findall(r"\d+", document.prompt)) == 2


def test_retellings_are_word_for_word():
    for document in filter(is_retold, stories()):
        story = document.prompt.removeprefix("Question: Tell this story again. ")
        assert story == document.target.strip() + "\nReasoning:"


def test_cards_hold_right_sums():
    found = set()
    for card in cards():
        left, sign, right = card.prompt.removesuffix(" =").split()
        found.add(sign)
        sums = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }
        assert int(card.target) == sums[sign]
    assert found == {"+", "-", "*"}


def test_no_document_holds_a_question_of_the_exam():
    """The world is so small that without the check most exam questions would turn up."""
    small = {"max_value": 2}
    exam = {question.text for question in questions(1000, steps=(1,), **small)}
    told = {text.rsplit(" How many", 1)[0] for text in exam}

    def leaks(drawn: list[scratch.Document]) -> int:
        asked = [d.prompt.removeprefix("Question: ").removesuffix("\nReasoning:") for d in drawn]
        again = [text.removeprefix("Tell this story again. ") for text in asked]
        return sum(a in exam or r in told for a, r in zip(asked, again, strict=True))

    assert leaks(stories(**small)) > 300
    assert leaks(stories(exam_texts=exam, **small)) == 0


@pytest.mark.parametrize("kind", ["cards", "stories"])
def test_a_batch_holds_the_documents_and_nothing_else(kind: str):
    drawn = cards()[:7] if kind == "cards" else stories()[:7]
    items = scratch.encode(iter(drawn), BACKEND)
    grid = make_grid(9, microbatches=1, shards=3)
    shapes = plan_shapes([items], grid, scratch.OBJECTIVE)
    batch = pack(items, grid, shapes, shared=(), objective=scratch.OBJECTIVE)
    begin, end = (BACKEND.token_to_id(token) for token in (scratch.BEGIN, scratch.END))
    found = set()
    for row in find_rows(batch):
        assert row.prompt[0] == begin and row.live[0][-1] == end and not row.cut
        found.add((BACKEND.decode(row.prompt[1:]), BACKEND.decode(row.live[0][:-1])))
    assert found == set(drawn)
    assert batch.counts.real == 7 and not batch.valid.any()


def test_muon_trains_the_matrices_of_the_blocks_and_adam_the_rest():
    """A first update of Muon has equal singular values; one of Adam has entries of equal size."""
    model = scratch.make_model(16, 2, 50)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    gradients = jax.tree.map(
        lambda leaf: jax.random.normal(next(keys), leaf.shape), abstract_params(model)
    )
    optimizer = scratch.make_optimizer(model, 10)
    updates: Any = optimizer.update(gradients, optimizer.init(gradients), gradients)[0]
    attention, mlp = updates["blocks"]["attention"], updates["blocks"]["mlp"]
    square = (attention[name].reshape(2, 16, 16) for name in ("query", "key", "value", "out"))
    for matrix in (*square, mlp["up"], mlp["gate"], mlp["down"]):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() < 3 * values.min(), "five iterations get this close to equal"
    for leaf in (updates["embedding"], updates["norm"]["scale"]):
        sizes = np.abs(leaf)
        np.testing.assert_allclose(sizes, np.full_like(sizes, sizes.mean()), rtol=1e-3)


def make(folder: Path) -> Path:
    scratch.make_student(
        tiny(),
        folder,
        questions=questions(60),
        mesh=make_mesh(1, 1, 1),
        progress=Progress(quiet=True),
    )
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run") / "student")


def test_the_student_loads_like_any_published_one(student: Path):
    model = read_model_config(student)
    assert model == scratch.make_model(16, 1, len(TOKENIZER))
    mesh = make_mesh(1, -1, 1)
    layout = shardings(mesh, logical_axes(model), abstract_params(model), EXAM_RULES)
    params = load_params(student, model, layout)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert load_tokenizer(str(student)).num_tokens == model.vocab_size


def test_the_same_seed_gives_the_same_student(student: Path, tmp_path: Path):
    again = make(tmp_path / "again")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (student / name).read_bytes()


def test_a_width_without_even_heads_is_refused():
    with pytest.raises(ValueError, match=r"scratch: the width is a multiple of 8; got 20\."):
        scratch.make_model(20, 1, 100)
