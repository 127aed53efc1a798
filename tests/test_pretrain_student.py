"""The script that makes one student for several runs."""

import importlib
import json
from pathlib import Path

import pytest

from distill_jax.tokenizer import load_tokenizer
from distill_jax.weights import read_model_config

pretrain_student = importlib.import_module("pretrain_student")

ROWS = (
    ("Ann bakes 3 muffins and 4 more. How many muffins?", "7", "train"),
    (
        "Ben mends 9 bicycles and sells 2. How many bicycles has he left to sell today?",
        "7",
        "train",
    ),
    ("Cy picks 5 cherries. How many cherries?", "5", "dev"),
    ("Ben mends 9 bicycles and sells 2. How many bicycles has he left to sell today?", "7", "test"),
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    questions = tmp_path / "mine.jsonl"
    rows = ({"question": text, "answer": said, "split": split} for text, said, split in ROWS)
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    path = tmp_path / "config.yaml"
    values = {
        "folder": str(tmp_path / "run"),
        "task": {"name": str(questions)},
        "student": {"model": "named later", "compute_dtype": "float32"},
        "scratch": [160, 3, 800],
    }
    path.write_text(json.dumps(values))
    return path


def pretrain(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_student.py", *map(str, words)])
    pretrain_student.main()


def test_it_knows_the_words_that_may_be_taught_and_no_others(
    config: Path, tmp_path: Path, monkeypatch, capsys
):
    student = tmp_path / "student"
    pretrain(monkeypatch, config, student, "scratch=[16, 1, 2]")
    assert capsys.readouterr().out.startswith(f"{student}: ")
    model, tokenizer = read_model_config(student), load_tokenizer(str(student))
    assert (model.width, model.layers, model.vocab_size) == (16, 1, tokenizer.num_tokens)
    known = {word: tokenizer.find_token(f" {word}") for word in ("muffins", "bicycles", "cherries")}
    # one question is an exam's, word for word, so its words are not learnt; dev's never are
    assert known["muffins"] is not None
    assert known["bicycles"] is known["cherries"] is None
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as ended:
        pretrain(monkeypatch, config, student)
    assert ended.value.code == 2 and "is there already" in capsys.readouterr().err
