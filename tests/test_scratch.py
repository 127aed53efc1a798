"""The student made from nothing: its tokenizer, its text, and what is written to disk."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import scratch
from distill_jax.config import Config, TutorConfig, parse_config
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


def documents(seed: int = 0, **changes) -> list[str]:
    drawn = {"max_value": 30, "exam_texts": set()} | changes
    return list(islice(scratch.draw_documents(Random(seed), **drawn), 3000))


def tiny() -> Config:
    return parse_config(
        {
            "folder": "unused",
            "seed": 4,
            "task": {"name": "arithmetic", "num_train": 60},
            "student": {"model": "scratch", "compute_dtype": "float32"},
            "scratch": {"width": 16, "layers": 1, "steps": 3},
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
    rates = TutorConfig(wrong_rate=wrong_rate, corrected_wrong_rate=wrong_rate)
    asked = questions(200)
    wrong = Tutor(asked, tutor=TutorConfig(wrong_rate=1.0), seed=1)
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
    for document in documents():
        assert_known_and_lossless(document)


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


def test_documents_come_in_the_stated_parts():
    def kind(document: str) -> str:
        if "Tell this story again" in document:
            return "retelling"
        if "What is" in document:
            return "fact"
        return "one step" if "Answer:" in document else "unanswered"

    found = Counter(map(kind, documents()))
    for name, share in scratch.DOCUMENTS.items():
        # three standard deviations of a share of 3000 draws are below 0.03
        assert abs(found[name] / 3000 - share / 100) < 0.03


def test_no_document_solves_more_than_one_step():
    for document in documents():
        question, _, solution = document.partition("\nReasoning:")
        equations = re.findall(r"\d+ [-+*] \d+ = \d+", solution.split("The first wrong")[0])
        assert len(equations) <= 1
        if equations and "What is" not in question:
            assert len(re.findall(r"\d+", question)) == 2


def test_retellings_are_word_for_word():
    told = [text for text in documents() if "Tell this story again. " in text]
    for document in told:
        story, retold = document.removeprefix("Question: Tell this story again. ").split(
            "\nReasoning: "
        )
        assert story == retold


def test_no_document_holds_a_question_of_the_exam():
    """The world is so small that without the check most exam questions would turn up."""
    small = {"max_value": 2}
    exam = {question.text for question in questions(1000, steps=(1,), **small)}
    stories = {text.rsplit(" How many", 1)[0] for text in exam}

    def leaks(drawn: list[str]) -> int:
        asked = (re.sub(r"\nReasoning:.*", "", text, flags=re.S) for text in drawn)
        asked = [text.removeprefix("Question: ") for text in asked]
        retold = [text.removeprefix("Tell this story again. ") for text in asked]
        return sum(a in exam or r in stories for a, r in zip(asked, retold, strict=True))

    assert leaks(documents(**small)) > 300
    assert leaks(documents(exam_texts=exam, **small)) == 0


def test_packing_keeps_every_document_whole():
    drawn = documents()
    rows = list(scratch.pack(iter(drawn), BACKEND))
    begin, end = (BACKEND.token_to_id(token) for token in (scratch.BEGIN, scratch.END))
    found = []
    for row in rows:
        assert row[0] == begin and row[-1] == end and begin not in row[1:]
        assert len(row) <= scratch.ROW_LENGTH
        text = BACKEND.decode(row[1:-1], skip_special_tokens=False)
        found += text.split(scratch.END)
    assert not Counter(found) - Counter(drawn)
    assert len(drawn) - len(found) <= scratch.OPEN_ROWS * 4, "only rows still open are missing"
    assert sum(map(len, rows)) > 0.9 * len(rows) * scratch.ROW_LENGTH


def test_a_batch_holds_the_rows_and_nothing_else():
    rows = list(islice(scratch.pack(iter(documents()), BACKEND), 5))
    batch = scratch.make_batch(rows, num_shards=4)
    assert batch.question.tokens.shape == (8, 1)
    assert batch.anchor.tokens.shape == (8, scratch.ROW_LENGTH - 1)
    assert list(batch.real) == [True] * 5 + [False] * 3
    tokens = np.concatenate([batch.question.tokens, batch.anchor.tokens], axis=1)
    mask = np.concatenate([batch.question.mask, batch.anchor.mask], axis=1)
    for row, ids, real in zip(rows, tokens, mask, strict=False):
        assert list(ids[real]) == row
    assert not mask[5:].any() and not batch.valid.any()
    assert batch.shared.size == batch.positive.tokens.size == batch.negative.tokens.size == 0


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
    with pytest.raises(ValueError, match=r"scratch.width must be a multiple of 8; got 20\."):
        scratch.make_model(20, 1, 100)
