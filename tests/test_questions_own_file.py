"""A user's own questions: what a row may hold, and the one sentence each malformed row gives."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_jax.config import TaskConfig
from distill_jax.questions import QuestionsError, load_questions
from distill_jax.questions.own_file import KEYS, read_own_file
from distill_jax.records import Question

GOOD = {"question": "2 + 2?", "answer": "4"}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_row_of_each_kind(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"question": " How many? ", "answer": 42, "solution": " 40 + 2 = 42. ", "group": "easy"},
        '{"question": "Price?", "answer": 3.50, "split": "test"}',
        {"question": "Cold?", "answer": "NO", "split": "dev", "id": 7},
        "",
        {"question": "Warm?", "answer": True, "choices": None, "kind": None},
        {"question": "Which?", "answer": "B", "choices": ["x", " y "]},
        {"question": "Who?", "answer": "Ada Lovelace", "id": "who", "split": "test"},
        {"question": "Line\u2028end?", "answer": "7", "kind": "text"},
    )
    numeric, test, dev = {"kind": "numeric"}, {"split": "test"}, {"split": "dev"}
    assert read_own_file(path) == [
        make("mine/train/0", "How many?", "42", **numeric, solution="40 + 2 = 42.", group="easy"),
        make("mine/test/0", "Price?", "3.50", **numeric, **test),
        make("7", "Cold?", "No", kind="yes_no", **dev),
        make("mine/train/1", "Warm?", "Yes", kind="yes_no"),
        make("mine/train/2", "Which?", "b", kind="choice", choices=("x", "y")),
        make("who", "Who?", "Ada Lovelace", kind="text", **test),
        make("mine/train/3", "Line\u2028end?", "7", kind="text"),
    ]


def make(id: str, text: str, answer: str, **fields: Any) -> Question:
    return Question(id=id, text=text, answer=answer, **{"split": "train", **fields})


@pytest.mark.parametrize("answer", ["18", "-5", "1,000", "$3.50", ".5", "3/4", "20%", "+7"])
def test_numbers_are_numeric(tmp_path: Path, answer: str) -> None:
    (question,) = read_own_file(write(tmp_path / "n.jsonl", {"question": "?", "answer": answer}))
    assert (question.kind, question.answer) == ("numeric", answer)


@pytest.mark.parametrize("answer", ["the 3 pigs", "1-2", "4 apples", "$", "yes and no", "3/", "."])
def test_what_only_holds_a_number_is_text(tmp_path: Path, answer: str) -> None:
    (question,) = read_own_file(write(tmp_path / "n.jsonl", {"question": "?", "answer": answer}))
    assert (question.kind, question.answer) == ("text", answer)


TWO = {"choices": ["x", "y"]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not a JSON object in UTF-8: Expecting property name"),
        (
            '{"question": "?", "answer": NaN}',
            "not a JSON object in UTF-8: NaN is not a JSON number",
        ),
        ([1], r"a JSON object was expected; got \[1\]"),
        ({"answer": "4"}, "question must be a text that is not empty; got nothing"),
        ({**GOOD, "question": "  "}, 'question must be a text that is not empty; got "  "'),
        ({**GOOD, "question": 5}, "question must be a text that is not empty; got 5"),
        ({"question": "?"}, "answer must be a text that is not empty, a number, .*; got nothing"),
        ({**GOOD, "answer": []}, r"answer must be .* number, true or false; got \[\]"),
        ({**GOOD, "choises": []}, "keys are question, .*; got 'choises' .did you mean choices"),
        ({**GOOD, "weight": 1}, "keys are question, .*; got 'weight'"),
        ({**GOOD, "kind": "number"}, 'kind must be one of numeric, .*, text; got "number"'),
        ({**GOOD, "split": "valid"}, 'split must be one of train, dev, test; got "valid"'),
        ({**GOOD, "split": []}, r"split must be one of train, dev, test; got \[\]"),
        ({**GOOD, "id": True}, "id must be a text that is not empty or a whole number; got true"),
        ({**GOOD, "id": ""}, 'id must be a text that is not empty or a whole number; got ""'),
        ({**GOOD, "solution": 4}, "solution must be a text"),
        ({**GOOD, "answer": "four", "kind": "numeric"}, 'number such as 18.* numeric; got "four"'),
        ({**GOOD, "kind": "yes_no"}, 'answer must be yes or no where kind is yes_no; got "4"'),
        ({**GOOD, "kind": "choice"}, "choices must be a list of .* kind is choice; got nothing"),
        ({**GOOD, **TWO, "kind": "text"}, 'kind must be choice, or absent, .*; got "text"'),
        ({**GOOD, **TWO}, 'answer must be the letter of a choice, a to b, .*; got "4"'),
        ({**GOOD, **TWO, "answer": "c"}, 'letter of a choice, a to b, .*; got "c"'),
        ({**GOOD, "choices": ["x"], "answer": "a"}, r'a list of 2 to 26 texts.*; got \["x"\]'),
        ({**GOOD, "choices": ["x", ""], "answer": "a"}, "a list of 2 to 26 texts, none empty"),
        ({**GOOD, "choices": "xy", "answer": "a"}, 'a list of 2 to 26 texts.*; got "xy"'),
        ({**GOOD, "id": "first"}, r'id must be different in every row \(line 1 .*; got "first"'),
    ],
)
def test_malformed_rows(tmp_path: Path, row: Any, problem: str) -> None:
    path = write(tmp_path / "mine.jsonl", {**GOOD, "id": "first"}, "", row, GOOD)
    with pytest.raises(QuestionsError, match=rf"mine\.jsonl, line 3: .*{problem}") as caught:
        read_own_file(path)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    with pytest.raises(QuestionsError, match=r"there is no file .*none\.jsonl"):
        read_own_file(tmp_path / "none.jsonl")
    with pytest.raises(QuestionsError, match="holds no question"):
        read_own_file(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?", "answer": "1"}')
    with pytest.raises(QuestionsError, match="line 1: not a JSON object in UTF-8"):
        read_own_file(tmp_path / "latin.jsonl")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.sampled_from(["numeric", "choice", "test", "yes", "a", "3"])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(VALUES, max_size=3)))
def test_any_row_is_read_or_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps({**GOOD, **row}), encoding="utf-8")
    try:
        (question,) = read_own_file(path)
    except QuestionsError:
        return
    assert question.text and question.answer and question.id
    assert bool(question.choices) == (question.kind == "choice")


def test_a_run_on_a_users_file(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(20)]
    name = str(write(tmp_path / "mine.jsonl", *rows))
    task = TaskConfig(name=name, num_train=15)
    questions = load_questions(task, seed=0, data_dir=tmp_path)
    assert Counter(q.split for q in questions) == {"train": 13, "dev": 2}
    with pytest.raises(QuestionsError, match=r'asks for 5 test questions .*"split": "test"'):
        load_questions(TaskConfig(name=name, num_test=5), seed=0, data_dir=tmp_path)


def test_dev_rows_of_ones_own_are_kept(tmp_path: Path) -> None:
    rows = [{**GOOD, "question": f"{i}?", "split": s} for i, s in enumerate(["dev", "train"] * 9)]
    task = TaskConfig(name=str(write(tmp_path / "mine.jsonl", *rows)), dev_fraction=0.5)
    questions = load_questions(task, seed=0, data_dir=tmp_path)
    assert [q.split for q in questions] == ["train"] * 9 + ["dev"] * 9
    assert [q.text for q in questions] == [f"{i}?" for i in (*range(1, 18, 2), *range(0, 18, 2))]
