"""`compare` on runs whose every mark is known: rows, differences, verdicts, budgets, files."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from sample_run import HOSTILE, NUM, STEPS, dump, sample_config, sample_questions, sit, write_run
from shell import command

from distill_jax.analysis.comparison import compare_runs
from distill_jax.analysis.findings import write_findings
from distill_jax.analysis.pooled import read_run
from distill_jax.config_file import to_yaml
from distill_jax.report.marks import Change, wilson
from distill_jax.report.summary import row_name
from distill_jax.run_folder import read_rows, update_round, write_json, write_rows

TEST = [question for question in sample_questions() if question.split == "test"]
ANSWERS = {1: 320, 2: 200, 3: 100}  # four to a question: 80 questions, then the mistakes


def make_run(folder: Path, right: int, **knobs) -> Path:
    """A sample run in which so many of the 50 test questions are right in the end."""
    write_run(folder, longest=100)
    (folder / "config.yaml").write_text(to_yaml(sample_config(folder, **knobs)))
    write_rows(folder / "round_03" / "test.jsonl", dump(sit(TEST, right, 3, 0)))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    made = {
        f"{name}-seed{seed}": make_run(home / f"{name}-seed{seed}", right, seed=seed, **knobs)
        for name, knobs, rights in (
            ("one_round", {}, {1: 20, 2: 24}),
            ("multi_round", {"reflection": {"weight": 0.0}}, {1: 40, 2: 43}),
            ("same", {"reflection": {"weight": 0.25}}, {1: 21, 2: 23}),
        )
        for seed, right in rights.items()
    }
    for seed in (1, 2):  # one round has had as many steps as all three of the others
        update_round(made[f"same-seed{seed}"], 3, steps=STEPS[3] + 90 * seed)
    return made


@pytest.fixture(scope="module")
def findings(runs):
    return compare_runs(list(runs.values()))


def test_runs_that_differ_in_their_seed_are_one_row(findings):
    one, multi, same = findings.facts["rows"]
    assert [row["name"] for row in (one, multi, same)] == ["one_round", "multi_round", "same"]
    assert [row["seeds"] for row in (one, multi, same)] == [[1, 2]] * 3
    assert one["by_seed"] == [20 / 50, 24 / 50] and one["accuracy"] == pytest.approx(22 / 50)
    assert one["interval"][0] < 22 / 50 < one["interval"][1]
    assert (one["steps"], same["steps"]) == (sum(STEPS.values()), sum(STEPS.values()) + 135)
    assert one["answers_asked"] == sum(ANSWERS.values())
    assert one["teacher_requests"] == sum(ANSWERS.values()) / 4


def test_students_pretrained_for_each_seed_are_one_setting(tmp_path):
    folders = [
        make_run(tmp_path / f"{seed}", seed, seed=seed, student={"model": f"lab/{seed}/student"})
        for seed in (1, 2)
    ]
    assert [row["seeds"] for row in compare_runs(folders).facts["rows"]] == [[1, 2]]


def test_students_that_differ_otherwise_are_rows_of_their_own(tmp_path):
    folders = [
        make_run(tmp_path / f"{seed}", seed, seed=seed, student={"model": f"lab/{seed + 1}"})
        for seed in (1, 2)
    ]
    assert len(compare_runs(folders).facts["rows"]) == 2


def test_a_large_difference_is_shown_and_a_small_one_is_not(findings):
    multi, same = findings.facts["against_first"]
    assert multi["verdict"] == "better" and same["verdict"] == "no difference shown"
    assert multi["difference"] == pytest.approx((20 + 19) / 2 / 50)
    assert (multi["gained"], multi["lost"]) == (39, 0)
    assert (same["gained"], same["lost"]) == (1, 1)
    assert multi["p_value"] < multi["p_bootstrap"] < 0.001
    assert multi["p_value_all_rows"] == 2 * multi["p_bootstrap"]  # of two rows
    assert (same["p_value"], same["p_value_all_rows"]) == pytest.approx((1.0, 1.0))
    low, high = multi["interval"]
    assert 0 < low < multi["difference"] < high


def test_kinds_of_question_are_told_apart(findings):
    one = findings.facts["rows"][0]
    # odd questions have 3 steps: of the first 20 ten are odd, of the first 24 twelve
    assert one["groups"]["3 steps <b>"] == pytest.approx((10 / 25 + 12 / 25) / 2)
    table = findings.tables[2]
    assert [row[0] for row in table.rows[:3]] == [f"2 steps, {row}" for row in "ABC"]
    gained = {row[0]: row[-2] for row in table.rows}
    assert gained["2 steps, B"] == "20 / 0" and gained["3 steps <b>, B"] == "19 / 0"
    assert gained["2 steps, A"] == "-"


def test_unequal_budgets_are_warned_of_with_their_size(findings):
    (budget,) = [note for note in findings.notes if "Not at equal" in note]
    assert budget == (
        "Not at equal steps: C (same) had 825.0 against 690.0 of A (one_round), "
        "1.20 times as many; 2 of 2 pairs differ."
    )
    assert any("Fewer than 5 seeds in A, B, C" in note for note in findings.notes)


def test_a_single_request_more_is_said_though_the_means_are_equal(runs, tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / f"other-seed{seed}")
        shutil.copytree(runs[f"multi_round-seed{seed}"], folders[-1])
    config = read_run(folders[0]).config.model_dump()
    for seed, folder in enumerate(folders, start=1):
        knobs = {"reflection": {**config["reflection"], "weight": 0.75}, "seed": seed}
        (folder / "config.yaml").write_text(to_yaml(sample_config(folder, **knobs)))
    lessons = [read_rows(folder / "round_03" / "lesson.jsonl") for folder in folders]
    moved, lessons[0] = lessons[0][-4:], lessons[0][:-4]
    lessons[1] += [row | {"question_id": "arithmetic/train/0"} for row in moved]
    for folder, rows in zip(folders, lessons, strict=True):
        write_rows(folder / "round_03" / "lesson.jsonl", rows)
    first = [runs["one_round-seed1"], runs["one_round-seed2"]]
    notes = [note for note in compare_runs([*first, *folders]).notes if "Not at equal" in note]
    assert notes == [
        "Not at equal requests: B (other) had 155.0 against 155.0 of A (one_round); "
        "2 of 2 pairs differ.",
        "Not at equal answers asked: B (other) had 620.0 against 620.0 of A (one_round); "
        "2 of 2 pairs differ.",
    ]
    write_rows(folders[0] / "round_03" / "lesson.jsonl", [*lessons[0], *moved])
    notes = [note for note in compare_runs([*first, *folders]).notes if "Not at equal" in note]
    assert notes[0] == (
        "Not at equal requests: B (other) had 155.5 against 155.0 of A (one_round), 1.00 times "
        "as many; 1 of 2 pairs differ."
    )


def test_rationales_that_were_judged_are_requests_too(runs, tmp_path):
    folder = tmp_path / "judged"
    shutil.copytree(runs["one_round-seed1"], folder)
    train = {"rows": ["new", "judged"]}
    (folder / "config.yaml").write_text(to_yaml(sample_config(folder, seed=1, train=train)))
    before, kept = read_run(runs["one_round-seed1"]).requests, []
    for index in (1, 2, 3):
        rows = read_rows(folder / f"round_0{index}" / "lesson.jsonl")
        kept.append({(r["question_id"], r["text"]) for r in rows if r["verdict"] == "kept"})
        write_rows(folder / f"round_0{index}" / "judged.jsonl", rows[:1])
    assert read_run(folder).requests == tuple(
        number + len(judged) for number, judged in zip(before, kept, strict=True)
    )


def test_one_seed_gives_wilsons_interval_and_the_exact_test(runs):
    found = compare_runs([runs["one_round-seed1"], runs["multi_round-seed1"]])
    row, against = found.facts["rows"][0], found.facts["against_first"][0]
    assert tuple(row["interval"]) == wilson(20, 50)
    assert against["p_value"] == pytest.approx(Change(20, 0).p_value)


def test_an_interval_alone_shows_nothing(runs, tmp_path):
    little = make_run(tmp_path / "little-seed1", 25, seed=1, reflection={"weight": 0.2})
    (against,) = compare_runs([runs["one_round-seed1"], little]).facts["against_first"]
    assert against["interval"][0] > 0 and against["p_value"] == pytest.approx(2 / 2**5)
    assert against["verdict"] == "no difference shown"


def test_a_seed_that_only_one_row_has_is_left_out_and_named(runs):
    names = ("one_round-seed1", "one_round-seed2", "multi_round-seed2")
    found = compare_runs([runs[name] for name in names])
    assert found.facts["against_first"][0]["gained"] == 43 - 24
    assert any("on the seeds that both have" in note for note in found.notes)


def test_the_papers_number_stands_beside_the_row_of_its_name(tmp_path):
    run = make_run(
        tmp_path / "multi_round-seed3", 30, task={"name": "svamp"}, student={"model": "m"}
    )
    (row,) = compare_runs([run]).facts["rows"]
    assert row["paper_row"] == "multi_round"
    assert row["paper_accuracy"] == 0.513


def test_dev_is_compared_on_request_and_said_to_flatter(runs):
    found = compare_runs([runs["one_round-seed1"]], split="dev")
    assert found.facts["rows"][0]["accuracy"] == 33 / 40
    assert any("flatter" in note for note in found.notes)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: (run / "result.json").unlink(), "has not ended"),
        (lambda run: (run / "config.yaml").unlink(), "holds no run"),
        (lambda run: (run / "round_03" / "test.jsonl").unlink(), "has no test exam of round 3"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(tmp_path, spoil, sentence):
    run = make_run(tmp_path / "run", 9)
    spoil(run)
    with pytest.raises(ValueError, match=sentence):
        read_run(run)


def test_a_run_given_twice_is_refused(runs):
    with pytest.raises(ValueError, match="same settings and the same seed"):
        compare_runs([runs["same-seed1"], runs["same-seed1"]])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/one_round_seed1", "one_round"),
        ("runs/lab/one_round/seed=12", "one_round"),
        ("runs/lab/x/rounds.max=2,seed=1", "x/rounds.max=2"),
        ("runs/seedling", "seedling"),
    ],
)
def test_names_of_rows(folder, name):
    assert row_name(Path(folder)) == name


def test_the_command_prints_tables_and_writes_every_kind_of_file(runs, tmp_path):
    words = [str(runs[name]) for name in ("one_round-seed1", "multi_round-seed1")]
    done = command("compare", *words, "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Against row A" in done.stdout and "+40.0" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    ends = {"md", "tex", "csv", "json"}
    assert {f"compare.{end}" for end in ends} | {
        "compare_accuracy.svg",
        "compare_accuracy.png",
    } <= names
    with (tmp_path / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == ["40.0%", "80.0%"]
    assert r"40.0\%" in (tmp_path / "out" / "compare.tex").read_text()
    assert "| A | one_round |" in (tmp_path / "out" / "compare.md").read_text()
    facts = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert facts["rows"][1]["accuracy"] == 0.8


def test_json_is_one_object_and_nothing_else(runs, tmp_path):
    done = command("compare", runs["same-seed1"], "--json", "--to", tmp_path)
    assert json.loads(done.stdout)["rows"][0]["accuracy"] == 21 / 50


def test_the_figure_says_which_row_is_which(runs, tmp_path):
    hostile = make_run(tmp_path / "it <i>is & $x_1$", 9, rounds={"max": 3, "patience": 2})
    found = compare_runs([runs["same-seed1"], hostile])
    write_findings(found, tmp_path / "out", "compare")
    svg = (tmp_path / "out" / "compare_accuracy.svg").read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert (
        "A  same" in words and "B  it &lt;i&gt;is &amp; $x_1$" in words and "accuracy, %" in words
    )
    assert 'id="row-A"' in svg and 'id="row-B"' in svg
    assert not any(text in (tmp_path / "out" / "compare.md").read_text() for text in HOSTILE)
    png = (tmp_path / "out" / "compare_accuracy.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) > 1200  # pixels in width


def test_without_a_ledger_nobody_was_asked(tmp_path):
    run = make_run(tmp_path / "star", 9)
    (run / "ledger.sqlite").unlink()
    assert sum(read_run(run).answers) == 0


def test_no_result_round_is_the_untrained_student(tmp_path):
    run = make_run(tmp_path / "run", 9)
    write_json(run / "result.json", {"stop_reason": "x", "chosen_round": 0, "rounds": 3})
    found = read_run(run)
    assert sum(found.marks.values()) == 3 and len(found.marks) == NUM["test"]
    assert sum(found.steps[: found.chosen_round]) == 0
