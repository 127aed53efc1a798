"""Rows of the comparison: each is settings of the one loop, and each count can be followed."""

import json
import re
from pathlib import Path

import pytest
from fault_server import Call, Says, chat, choice, error, fault_server

from distill_jax import rounds, scratch
from distill_jax.config import Config, ConfigError, parse_config
from distill_jax.config_file import override
from distill_jax.questions import load_questions
from distill_jax.records import Attempt, Question, Rationale
from distill_jax.replay import replay_run
from distill_jax.report.page import write_page
from distill_jax.report.summary import status_json, summarise
from distill_jax.run_folder import read_json, read_records, read_rows
from distill_jax.student.sharding import make_mesh
from distill_jax.teacher.audit import read_totals
from distill_jax.teacher.tutor import Tutor

VALUES = {
    "folder": "-",
    "task": {
        "name": "arithmetic",
        "num_train": 40,
        "num_test": 6,
        "dev_fraction": 0.2,
        "arithmetic": [[1], 4],
    },
    "student": {"model": "scratch", "compute_dtype": "float32"},
    "scratch": [32, 2, 400],
    "exam": {"samples": 2, "max_new_tokens": [24, 24], "slots": 16},
    "teacher": {"samples": 2},
    "train": {
        "epochs": 1,
        "batch_size": 8,
        "microbatch_size": 8,
        "learning_rates": [1e-5],
        "warmup_steps": 0,
    },
    "reflection": {"objective": "none"},
    "rounds": {"max": 1},
    "mesh": {"fsdp": 1},
}
BASE = parse_config(VALUES)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student that gets some of the one-step questions right."""
    folder = tmp_path_factory.mktemp("student") / "student"
    questions = load_questions(BASE.task, seed=BASE.seed, data_dir=folder)
    scratch.make_student(
        BASE, folder, questions=questions, mesh=make_mesh(1, 1, 1), progress=rounds.Progress()
    )
    return folder


class Played:
    """A finished run."""

    def __init__(self, config: Config):
        self.result = rounds.run(config)
        self.folder = Path(config.folder)
        rows = read_records(self.folder / "questions.jsonl", Question)
        self.train = [question for question in rows if question.split == "train"]
        self.json = status_json(summarise(self.folder))
        write_page([self.folder], self.folder / "report.html")

    def attempts(self, stage: str, round_index: int = 1) -> list[Attempt]:
        return read_records(self._round(round_index) / f"{stage}.jsonl", Attempt)

    def lesson(self, round_index: int = 1) -> list[Rationale]:
        return read_records(self._round(round_index) / "lesson.jsonl", Rationale)

    def facts(self, round_index: int = 1) -> dict:
        return read_json(self._round(round_index) / "round.json")

    def num_requests(self) -> int:
        ledger = self.folder / "ledger.sqlite"
        return read_totals(ledger).num_requests if ledger.exists() else 0

    def _round(self, round_index: int) -> Path:
        return self.folder / f"round_{round_index:02d}"


@pytest.fixture
def play(student: Path, tmp_path: Path):
    def start(*overrides: str) -> Played:
        given = [f"folder={tmp_path / 'run'}", f"student.model={student}", *overrides]
        return Played(override(BASE, given))

    return start


def test_the_student_teaches_itself_and_explains_what_it_got_wrong(play):
    run = play(
        "teacher.url=self",
        "teacher.samples=1",
        "rounds.max=2",
        "rounds.patience=2",
        "train.start=base",
    )
    assert run.num_requests() == 0
    for index in (1, 2):
        greedy = [a for a in run.attempts("exam", index) if a.sample_index == 0]
        right = {a.question_id for a in greedy if a.correct}
        hinted = run.attempts("hinted", index)
        assert right and {a.question_id for a in hinted} == {q.id for q in run.train} - right
        lesson = run.lesson(index)
        assert len(lesson) == len(run.train) + len(hinted)
        kept = {row.question_id for row in lesson if row.verdict == "kept"}
        assert kept <= right | {a.question_id for a in hinted if a.correct}
        assert run.facts(index)["rows"] == len(kept)


def test_without_a_hint_only_right_answers_are_learnt(play):
    run = play("teacher.url=self", "teacher.samples=3", "teacher.hint=false")
    assert not (run.folder / "round_01" / "hinted.jsonl").exists()
    assert len(run.lesson()) == 3 * len(run.train)
    right = {a.question_id for a in run.attempts("exam") if a.correct}
    assert {row.question_id for row in run.lesson() if row.verdict == "kept"} <= right


def test_bare_answers_need_no_teacher(play):
    run = play("train.targets=[answer]")
    assert run.num_requests() == 0 and run.lesson() == []
    with pytest.raises(ConfigError, match="asked no teacher"):
        replay_run(run.folder)
    assert run.facts()["rows"] == len(run.train)
    (row,) = [row for row in run.json["rounds"] if row["round"] == 1]
    assert row["rows"] == len(run.train)


def test_forms_are_mixed(play):
    run = play("train.targets=[rationale, answer, rationale_alone]")
    kept = [row for row in run.lesson() if row.verdict == "kept"]
    assert run.facts()["rows"] == 2 * len(kept) + len({row.question_id for row in kept})


def test_steps_are_those_asked_for(play):
    run = play("train.steps=[5, 3]", "rounds.max=2", "rounds.patience=2", "train.rows=[new, old]")
    assert [run.facts(index)["steps"] for index in (1, 2)] == [5, 3]
    metrics = read_rows(run.folder / "round_02" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]


def test_own_right_samples_join_the_lesson(play):
    run = play("train.rows=[new, own]")
    texts = {(row.question_id, row.text) for row in run.lesson() if row.verdict == "kept"}
    own = {a.question_id for a in run.attempts("exam") if a.correct}
    assert own
    assert len(texts) < run.facts()["rows"] <= len(texts) + 3 * len(own)
    alone = play("train.rows=[own]", f"folder={run.folder.with_name('own')}")
    assert 0 < alone.facts()["rows"] <= 3 * len(own)


def test_the_teacher_judges_what_is_trained_on(play):
    run = play("train.rows=[new, own, judged]", "tutor.wrong_rates=[0.1, 0.3]")
    judged = read_records(run.folder / "round_01" / "judged.jsonl", Rationale)
    new = {(row.question_id, row.text) for row in run.lesson() if row.verdict == "kept"}
    approved = {(row.question_id, row.text) for row in judged}
    own = approved - new
    assert own and new - approved
    assert run.facts()["rows"] == len(approved)
    assert run.facts()["dropped_rows"]["doubted"] >= len(new - approved)
    own_texts = [a for a in run.attempts("exam") if a.correct]
    num_candidates = len(new) + len(own_texts)
    assert len(run.train) < run.num_requests() <= len(run.train) + num_candidates


def test_nothing_is_trained_where_no_round_is_played(play):
    run = play("rounds.max=0", "train.targets=[answer]")
    assert run.result == {
        "stop_reason": "the limit of 0 rounds", "chosen_round": 0, "rounds": 0,
    }  # fmt: skip
    assert run.num_requests() == 0 and len(run.attempts("test", 0)) == 6
    assert run.json["phase"] == "done"


def test_the_teacher_sits_the_exams(tmp_path: Path):
    settings = [f"folder={tmp_path / 'run'}", "student.model=teacher", "rounds.max=0"]
    run = Played(override(BASE, [*settings, "tutor.wrong_rates=[0.0, 0.0]"]))
    held_out = run.attempts("dev", 0) + run.attempts("test", 0)
    assert all(attempt.correct for attempt in held_out)
    assert run.num_requests() == len(held_out) == 14
    erring = [*settings, f"folder={tmp_path / 'erring'}", "tutor.wrong_rates=[0.5, 0.0]"]
    wrong = [a for a in Played(override(BASE, erring)).attempts("dev", 0) if not a.correct]
    assert 0 < len(wrong) < 8
    with pytest.raises(ConfigError, match=r"sits exams alone: set rounds\.max=0"):
        override(BASE, ["student.model=teacher"])


def test_a_test_question_is_never_taught(play, tmp_path: Path):
    same = "Ann has 2 red eggs and 3 blue eggs in her bag. How many eggs has she?"
    rows = [
        {"question": same, "answer": "5", "split": "train", "solution": "2 + 3 = 5."},
        {"question": f"Today {same}", "answer": "5", "split": "train", "solution": "2 + 3 = 5."},
        {"question": "Tom has 3 eggs. He finds 1. How many?", "answer": "4", "split": "train",
         "solution": "3 + 1 = 4."},
        {"question": "Mia has 1 egg. How many?", "answer": "1", "split": "dev"},
        {"question": same.replace("her", "HER"), "answer": "5", "split": "test"},
    ]  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = play(f"task.name={file}", "task.num_train=0", "task.num_test=0")
    assert [question.text for question in run.train] == [rows[2]["question"]]
    found = read_json(run.folder / "manifest.json")["contamination"]
    assert (found["train_questions_same"], found["train_questions_overlapping"]) == (1, 1)
    assert len(found["left_out"]) == 2
    assert {row.question_id for row in run.lesson()} == {run.train[0].id}
    report = (run.folder / "report.html").read_text()
    assert "train_questions_overlapping" in report


def test_likely_words_are_learnt_too_where_the_teacher_tells_them(play, tmp_path: Path):
    hard = play("train.steps=[3]", f"folder={tmp_path / 'hard'}")
    run = play("train.steps=[3]", "train.rows=[new, soft]", "tutor.wrong_rates=[0.3, 0.3]")
    kept = [row for row in run.lesson() if row.verdict == "kept"]
    assert all(row.pieces for row in kept) and not any(row.pieces for row in hard.lesson())
    assert not any(row.pieces for row in run.lesson() if row.verdict != "kept")
    facts, before = run.facts(), hard.facts()
    assert facts["rows"] == len(kept) and before["soft_tokens"] == 0
    assert len(kept) < facts["soft_tokens"] < facts["target_tokens"] / 2
    (row,) = [row for row in run.json["rounds"] if row["round"] == 1]
    assert row["soft_tokens"] == facts["soft_tokens"]
    assert "Soft targets" in (run.folder / "report.html").read_text()
    assert "Soft targets" not in (hard.folder / "report.html").read_text()
    now = replay_run(run.folder)["rounds"]
    assert [entry["changed"] for entry in now] == [0]


@pytest.mark.parametrize("status", [400, 403])
def test_a_teacher_that_tells_no_likelihoods_teaches_hard_words(play, tmp_path, status: int):
    questions = load_questions(BASE.task, seed=BASE.seed, data_dir=tmp_path)
    tutor = Tutor(questions, tutor=BASE.tutor, seed=BASE.seed)

    def refuse(call: Call) -> Says:
        if "logprobs" in call.body:
            return error(status, message="You are not allowed to request logprobs from this model")
        texts = tutor.answer(call.prompt, samples=call.n) or []
        return Says(body=chat(call, choices=[choice(t, index=i) for i, t in enumerate(texts)]))

    with fault_server(refuse) as (server, url):
        run = play(
            *("train.steps=[1]", "train.rows=[new, soft]", f"teacher.url={url}"),
            *("teacher.model=m", "teacher.concurrency=2"),
        )
    refused = [call for call in server.calls if "logprobs" in call.body]
    assert 1 <= len(refused) <= 2  # what was on its way when the first was refused
    assert len(server.calls) == len(run.train) + len(refused)
    assert run.facts()["rows"] > 0 and run.facts()["soft_tokens"] == 0
    assert re.search(r"Soft targets.*0\.0%", (run.folder / "report.html").read_text(), re.S)


def test_a_round_of_rows_that_are_all_too_long_ends_the_run_and_is_not_paid_again(play, tmp_path):
    questions = load_questions(BASE.task, seed=BASE.seed, data_dir=tmp_path)
    tutor = Tutor(questions, tutor=BASE.tutor, seed=BASE.seed)

    def ramble(call: Call) -> Says:
        texts = tutor.answer(call.prompt, samples=call.n) or []
        said = [choice("So then. " * 400 + text, index=i) for i, text in enumerate(texts)]
        return Says(body=chat(call, choices=said))

    with fault_server(ramble) as (server, url):
        settings = [f"teacher.url={url}", "teacher.model=m", "rounds.max=3", "rounds.patience=3"]
        run = play(*settings, "tutor.wrong_rates=[0.0, 0.0]")
        kept = [row for row in run.lesson() if row.verdict == "kept"]
        assert kept and run.result["rounds"] == run.result["chosen_round"] == 0
        assert f"all rows, {len(kept)}, are too long for" in str(run.result["stop_reason"])
        assert run.facts()["rows"] == 0 and run.facts()["dropped_rows"] == {"too_long": len(kept)}
        assert not (run.folder / "round_01" / "metrics.jsonl").exists()
        (run.folder / "result.json").unlink()
        assert play(*settings, "tutor.wrong_rates=[0.0, 0.0]").result == run.result
        assert len(server.calls) == len(run.train)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["train.rows=[own]", "exam.samples=0"], "set exam.samples to 1 or more"),
        (["teacher.url=self", "teacher.samples=4"], "3 in all; got teacher.samples=4"),
        (["train.targets=[answer, rationale]"], "put rationale first"),
        (["teacher.url=self", "train.targets=[answer]"], "put rationale first"),
        (["train.rows=[judged]"], "put new, old or own beside judged"),
        (["train.rows=[new, soft]", "teacher.url=self"], "a teacher other than the student"),
        (["train.rows=[new, soft]", "train.targets=[answer]"], "rationale among train.targets"),
        (["train.rows=[new, judged]", "teacher.url=self"], "other than the student"),
    ],
)
def test_what_cannot_work_is_refused(settings: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        override(BASE, settings)
