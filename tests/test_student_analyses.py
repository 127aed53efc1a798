"""A sweep of real runs, and the analyses that need their students."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_devices import fake_devices
from sample_run import sample_config, write_run
from shell import command
from test_rounds import SMALL

from distill_jax.analysis.paths import Paths, Scores, gather_paths, score_paths
from distill_jax.analysis.pooled import read_run
from distill_jax.analysis.reflection import MEASURES, measure
from distill_jax.analysis.state_map import measure_states
from distill_jax.analysis.sweep import plan_sweep
from distill_jax.analysis.transfer import study_transfer
from distill_jax.analysis.voting import study_voting
from distill_jax.config import ConfigError, parse_config
from distill_jax.config_file import to_yaml
from distill_jax.exam import accuracy
from distill_jax.progress import Progress
from distill_jax.prompts import mistake_target, target
from distill_jax.records import Attempt, Question, Rationale, to_json
from distill_jax.run_folder import (
    partial_path,
    read_records,
    read_rows,
    write_json,
    write_rows,
)
from distill_jax.school import open_student
from distill_jax.teaching import exam_prompt

QUIET = Progress(quiet=True)
ONE_DEVICE = {"XLA_FLAGS": fake_devices(1)}
SWEEP = ("student.model=/nowhere,scratch", "rounds.max=1")
CHEAP = {  # one program of each sort
    "scratch": (32, 2, 4),
    "train": {**SMALL["train"], "epochs": 1, "batch_size": 64, "microbatch_size": 64},
}


def sweep(home: Path) -> subprocess.CompletedProcess:
    words = ("sweep", home / "small.yaml", *SWEEP, "--to", home, "--json")
    return command(*words, **ONE_DEVICE)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    home = tmp_path_factory.mktemp("sweep")
    small = {"folder": "unused", **SMALL, **CHEAP}
    (home / "small.yaml").write_text(yaml.safe_dump(small))
    return home, sweep(home)


@pytest.fixture(scope="module")
def run(swept) -> Path:
    return swept[0] / "small" / "student.model=scratch"


@pytest.fixture(scope="module")
def mixed(run, tmp_path_factory) -> Path:
    """A run whose exam was half right: texts are ours, weights are real."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    shutil.copytree(run, folder)
    questions = read_records(folder / "questions.jsonl", Question)
    rows = []
    for question in (question for question in questions if question.split == "train"):
        for sample in range(3):
            text = f" {question.solution}\nAnswer: {question.answer if sample else -1}"
            said = (question.id, 0, sample, text if sample < 2 else f" Nothing.{text}")
            answer = question.answer if sample == 1 else "-1"
            attempt = Attempt(*said, answer, correct=sample == 1, cut=False, num_tokens=9)
            rows.append(to_json(attempt))
    write_rows(folder / "round_01" / "exam.jsonl", rows)
    return folder


def test_a_failing_member_keeps_no_other_and_the_exit_code_tells(swept, run):
    home, done = swept
    facts = json.loads(done.stdout)
    assert done.returncode == 2 and "/nowhere is not a directory" in done.stderr, done.stderr
    assert [member["exit_code"] for member in facts["members"]] == [2, 0]
    assert [member["finished"] for member in facts["members"]] == [False, True]
    (row,) = facts["comparisons"]["arithmetic"]["rows"]
    assert row["runs"] == [str(run)]
    assert row["steps"] == len(read_rows(run / "round_01" / "metrics.jsonl"))
    ends = {".md", ".tex", ".csv", ".json", ".svg", ".png"}
    assert {path.suffix for path in home.glob("sweep*")} == ends
    assert "failed with exit code 2" in (home / "sweep.md").read_text()


def test_the_same_command_goes_on_where_it_stopped(swept, run):
    home, before = swept
    (run / "result.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in run.glob("round_*/*.jsonl")}
    after = sweep(home)
    assert {path: path.stat().st_mtime_ns for path in run.glob("round_*/*.jsonl")} == times
    assert len(times) >= 5 and (run / "result.json").exists()
    assert json.loads(after.stdout) == json.loads(before.stdout)


def test_members_are_named_after_what_varies(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"folder": str(tmp_path / "runs"), **SMALL}))
    settings = ["seed=1,2", "train.learning_rates=[1e-4],[1e-3, 1e-5]", "rounds.max=3"]
    members = plan_sweep([path], settings)
    names = [member.folder.relative_to(tmp_path / "runs").as_posix() for member in members]
    assert names[:2] == [
        "seed=1,train.learning_rates=-1e-4",
        "seed=1,train.learning_rates=-1e-3-1e-5",
    ]
    assert len(names) == 4 and not (tmp_path / "runs").exists()
    assert {member.config.rounds.max for member in members} == {3}
    assert members[3].config.train.learning_rates == (1e-3, 1e-5)
    assert members[3].config.seed == 2
    with pytest.raises(ConfigError, match="two members of the sweep"):
        plan_sweep([path, path], settings)
    with pytest.raises(ConfigError, match=r"did you mean train\.epochs"):
        plan_sweep([path], ["train.epochz=1,2"])
    with pytest.raises(ConfigError, match="names its own folders"):
        plan_sweep([path], ["folder=a,b"])


def test_reflection_prints_every_definition(run, mixed, tmp_path):
    done = command(*("analyse", "reflection", mixed, run, "--to", tmp_path, "--json"), **ONE_DEVICE)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["questions"] and facts["right"] and facts["wrong"]
    first, second = (run["measures"] for run in facts["runs"])
    assert set(first) == set(MEASURES) == set(facts["against_first"][0])
    gap = facts["against_first"][0]["distance"]
    assert gap["difference"] == pytest.approx(second["distance"] - first["distance"])
    assert first["distance"] > 0 and 0 <= first["right is likelier"] <= 100
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".tex", ".csv", ".json"}


def test_states_are_mapped_and_measured(mixed, tmp_path):
    done = command("analyse", "states", mixed, "--to", tmp_path, "--json", **ONE_DEVICE)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["questions"] == 24 and facts["runs"][0]["right"] == 24
    assert -1 <= facts["runs"][0]["silhouette"] <= 1 and 0 <= facts["runs"][0]["probe_auc"] <= 1
    svg = (tmp_path / "states_states.svg").read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "A: run" in words and {"right", "wrong"} <= set(words)
    right = svg[svg.index('id="A-right"') : svg.index('id="A-wrong"')]
    assert right.count("<use ") == 24


def test_without_scikit_learn_the_command_says_what_to_install(mixed):
    code = (
        "import sys; sys.modules['sklearn'] = None; from distill_jax.cli import app; "
        f"sys.argv = ['distill-jax', 'analyse', 'states', {str(mixed)!r}]; app()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'distill_jax[analysis]'" in done.stderr


def test_transfer_takes_each_exam_once(shared, tmp_path):
    student = {"model": str(shared / "models" / "stories260k"), "compute_dtype": "float32"}
    taught = {"name": "svamp", "demonstrations": ()}
    exam = {"samples": 2, "max_new_tokens": (8, 8)}
    run = write_run(tmp_path / "run", longest=100)
    config = sample_config(run, student=student, task=taught, exam=exam)
    (run / "config.yaml").write_text(to_yaml(config))
    write_json(run / "result.json", {"stop_reason": "x", "chosen_round": 0, "rounds": 0})
    own = tmp_path / "own.jsonl"
    numbers = ("one", "two", "three")
    rows = [{"question": f"{n} and 1?", "answer": "7", "split": "test"} for n in numbers]
    write_rows(own, rows)
    first = study_transfer([run], [str(own)], progress=QUIET)
    (mark,) = first.facts["exams"]
    assert (mark["questions"], mark["taught"], mark["round"]) == (3, "svamp", 0)
    own.unlink()  # nothing is asked again
    assert study_transfer([run], [str(own)], progress=QUIET).facts == first.facts
    with pytest.raises(ValueError, match="own"):
        study_transfer([run], [str(own)], ["exam.top_k=5"], progress=QUIET)


def test_votes_are_drawn_once_and_marked(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    study_voting([folder], votes=3, progress=QUIET)
    path = folder / "analysis" / "votes_3.jsonl"
    drawn = path.read_text().splitlines(keepends=True)
    test = [q for q in read_records(folder / "questions.jsonl", Question) if q.split == "test"]
    attempts = read_records(path, Attempt)
    asked = {(attempt.question_id, attempt.sample_index) for attempt in attempts}
    assert asked == {(question.id, sample) for question in test for sample in range(1 + 3)}
    greedy = {a.question_id: a.text for a in attempts if a.sample_index == 0}
    chosen = read_run(folder).chosen_round
    sat = read_records(folder / f"round_{chosen:02d}" / "test.jsonl", Attempt)
    assert greedy == {a.question_id: a.text for a in sat}

    path.unlink()  # killed in the third question
    partial_path(path).write_text("".join(drawn[:10]))
    study_voting([folder], votes=3, progress=QUIET)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(drawn)

    gold = {question.id: question.answer for question in test}
    agreed = {question.id for question in test[:4]}
    rows = [
        replace(attempt, answer=gold[attempt.question_id], correct=True)
        if attempt.question_id in agreed and attempt.sample_index > 1
        else replace(attempt, answer="-1", correct=attempt.sample_index == 0)
        for attempt in attempts
    ]
    write_rows(path, map(to_json, rows))
    done = command("analyse", "voting", folder, "--votes", "3", "--json", **ONE_DEVICE)
    alone, voted = json.loads(done.stdout)["rows"]
    assert (alone["name"], voted["name"]) == ("run", "run, 3 votes")
    assert alone["accuracy"] == accuracy(sat) and voted["accuracy"] == 4 / 6
    assert voted["original_accuracy"] == 0  # by what stands in the texts, which are not ours


def test_measures_against_loops():
    rng = np.random.default_rng(2)
    names = ["a", "b", "a", "a", "b", "a", "c"]
    right = np.array([True, True, True, False, False, False, True])
    scores = Scores(names, right, rng.normal(size=7), rng.normal(size=(7, 5)))
    found = measure(scores)
    assert set(found["distance"]) == {"a", "b"}  # c has no wrong text
    pairs = [(i, j) for i in (0, 2) for j in (3, 5)]
    x, logs = scores.states, scores.likelihoods
    apart = [np.sqrt(sum((x[i] - x[j]) ** 2)) for i, j in pairs]
    assert found["distance"]["a"] == pytest.approx(np.mean(apart))
    ratios = [100 * np.exp(logs[i]) / np.exp(logs[j]) for i, j in pairs]
    assert found["likelihood ratio"]["a"] == pytest.approx(np.mean(ratios))
    wins = [100.0 * (logs[i] > logs[j]) for i, j in pairs]
    assert found["right is likelier"]["a"] == pytest.approx(np.mean(wins))
    odds = [100 / (1 + np.exp(logs[j] - logs[i])) for i, j in pairs]
    assert found["sigmoid of the gap"]["a"] == pytest.approx(np.mean(odds))
    cosines = [1 - x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for i, j in pairs]
    assert found["cosine distance"]["a"] == pytest.approx(np.mean(cosines))
    centres = (x[0] + x[2]) / 2 - (x[3] + x[5]) / 2
    assert found["distance of means"]["a"] == pytest.approx(np.sqrt(centres @ centres))
    lengths = [np.sqrt(x[i] @ x[i]) for i in (0, 2, 3, 5)]
    expected = np.mean(apart) / np.mean(lengths)
    assert found["distance over length"]["a"] == pytest.approx(expected)


def test_the_probe_sees_what_is_there_and_nothing_else():
    rng = np.random.default_rng(4)
    names = [f"q{i // 2}" for i in range(80)]
    right = np.arange(80) % 2 == 0
    noise = rng.normal(size=(80, 6)).astype(np.float32)
    apart = noise + np.where(right, 4.0, 0.0)[:, None].astype(np.float32)
    near, seen = measure_states(Scores(names, right, np.zeros(80), apart))
    far, blind = measure_states(Scores(names, right, np.zeros(80), noise))
    assert seen > 0.98 and 0.3 < blind < 0.7
    assert near > 0.3 > 0.1 > far


def test_readings_are_those_of_transformers(shared, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    base = shared / "models" / "stories260k"
    student = {"model": str(base), "compute_dtype": "float32"}
    values = {"folder": str(tmp_path), "task": {"name": "svamp", "demonstrations": ()}}
    values["student"] = student
    config = parse_config(values)
    questions = {
        f"q{i}": Question(f"q{i}", text, "7", "train", "numeric")
        for i, text in enumerate(("How many?", "Tom has 3 cats. How many now?", "Why 7?"))
    }
    right = [
        Rationale(name, 1, k, text, "7", "kept")
        for name in questions
        for k, text in enumerate(("It is seven.", "3 and 4 cats make 7 cats in all.")[: len(name)])
    ]
    wrong = [
        Attempt(name, 0, 1, f"No {name} at all.\nAnswer: 8", "8", False, False, 5)
        for name in questions
    ]
    opened = open_student(config, base, tmp_path)
    params = opened.weights.get(0)
    scores = score_paths(config, opened, params, Paths(questions, tuple(right), tuple(wrong)))
    assert len(scores.question_ids) == len(right) + len(wrong)
    assert scores.right.sum() == len(right)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected: dict[tuple[str, bool], list[tuple[float, np.ndarray]]] = {}
    texts = [(r.question_id, True, target(questions[r.question_id], r.text)) for r in right]
    texts += [(w.question_id, False, mistake_target(w.text)) for w in wrong]
    for name, side, text in texts:
        prompt = exam_prompt(config, questions[name])
        head = list(opened.tokenizer.encode_prompt(prompt))
        tail = list(opened.tokenizer.encode_target(prompt, text))
        with torch.no_grad():
            out = model(torch.tensor([head + tail]), output_hidden_states=True)
        logs = torch.log_softmax(out.logits[0], -1)
        mean = np.mean([float(logs[len(head) + i - 1, token]) for i, token in enumerate(tail)])
        expected.setdefault((name, side), []).append(
            (float(mean), out.hidden_states[-1][0, -1].numpy())
        )
    for (name, side), values in expected.items():
        mine = [
            i
            for i, (n, r) in enumerate(zip(scores.question_ids, scores.right, strict=True))
            if (n, bool(r)) == (name, side)
        ]
        assert len(mine) == len(values)
        for i, (mean, state) in zip(
            sorted(mine, key=lambda i: scores.likelihoods[i]),
            sorted(values, key=lambda value: value[0]),
            strict=True,
        ):
            assert scores.likelihoods[i] == pytest.approx(mean, abs=2e-5)
            np.testing.assert_allclose(scores.states[i], state, atol=2e-4)


def test_paths_are_those_of_questions_that_have_both(mixed):
    own = gather_paths(mixed, right="student", limit=7)
    assert len(own.questions) == 7 == len(own.right) == len(own.wrong)
    taught = gather_paths(mixed, right="teacher", limit=1000)
    kept = {
        row.question_id
        for row in read_records(mixed / "round_01" / "lesson.jsonl", Rationale)
        if row.verdict == "kept"
    }
    assert set(taught.questions) == kept
    rows = read_rows(mixed / "round_01" / "exam.jsonl")
    write_rows(mixed / "round_01" / "exam.jsonl", [r for r in rows if r["sample_index"] == 0])
    greedy = gather_paths(mixed, right="teacher", limit=1000)
    assert {attempt.sample_index for attempt in greedy.wrong} == {0}
    write_rows(mixed / "round_01" / "exam.jsonl", [row | {"correct": True} for row in rows])
    with pytest.raises(ValueError, match="no training question with right and wrong"):
        gather_paths(mixed, right="teacher", limit=9)
    write_rows(mixed / "round_01" / "exam.jsonl", rows)
