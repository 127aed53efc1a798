"""Analyses that read records alone, on runs whose every count is known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_run import (
    DEV_RIGHT,
    HOSTILE,
    NUM,
    STEPS,
    TEST_RIGHT,
    TRAIN_RIGHT,
    sample_config,
    write_run,
)
from shell import command

from distill_jax.analysis.feedback import study_feedback
from distill_jax.analysis.findings import write_findings
from distill_jax.analysis.round_course import study_rounds
from distill_jax.analysis.setting import WINDOW, study_setting
from distill_jax.analysis.stories import Fate, choose_stories, read_stories, tell
from distill_jax.config import ConfigError
from distill_jax.config_file import to_yaml
from distill_jax.report.published import FIGURE_5, TABLE_3, TABLE_5
from distill_jax.report.style import write_figure
from distill_jax.run_folder import read_rows, write_json, write_rows

WITH_FEEDBACK = {"teacher": {"feedback": True}}
WITHOUT = {"teacher": {"feedback": False}}


def make_run(folder: Path, **knobs) -> Path:
    write_run(folder, longest=100)
    (folder / "config.yaml").write_text(to_yaml(sample_config(folder, **knobs)))
    return folder


def reject(run: Path, round_index: int, questions: int) -> None:
    """Makes the teacher's answers to the first questions of a lesson wrong ones."""
    path = run / f"round_{round_index:02d}" / "lesson.jsonl"
    rows = read_rows(path)
    names = list(dict.fromkeys(row["question_id"] for row in rows))[:questions]
    spoilt = [row | {"verdict": "wrong"} if row["question_id"] in names else row for row in rows]
    write_rows(path, spoilt)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("shown") / "shown", **WITH_FEEDBACK)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("hidden") / "hidden", **WITHOUT)
    reject(run, 2, 20)
    rows = read_rows(run / "round_03" / "lesson.jsonl")
    write_rows(run / "round_03" / "lesson.jsonl", rows[: 4 * 15])  # it asked about 15 of the 25
    return run


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_feedback_counts_requests_and_successes(shown, hidden):
    found = study_feedback([shown, hidden])
    first, _, without, third = found.facts["rounds"]
    mistakes = NUM["train"] - TRAIN_RIGHT[2]
    assert (first["feedback"], first["round"]) == (True, 2)
    # answers are dealt out in tens, four to a question: of any five questions one is not taught
    assert first["requests"] == mistakes == 50 and first["successes"] == 40
    assert without["requests"] == 50 and without["successes"] == 40 - 16
    assert first["answers_asked"] == 200 and first["kept"] == 200 // 2
    assert third["requests"] == 15
    second, last = found.facts["pairs"]
    assert (second["gained"], second["lost"], second["same_questions"]) == (16, 0, True)
    assert second["difference"] == pytest.approx(16 / 50) and second["p_value"] < 0.001
    assert (last["questions"], last["same_questions"], last["difference"]) == (15, False, 0.0)
    assert any("15 of 25 questions were asked by both" in note for note in found.notes)


def test_feedback_without_a_pair_claims_nothing(shown):
    assert any("says what feedback does" in note for note in study_feedback([shown]).notes)


def test_the_papers_feedback_stands_beside_ours(tmp_path):
    run = make_run(tmp_path / "run", task={"name": "svamp"}, student={"model": "m"})
    paper = study_feedback([run]).tables[2]
    assert [row[1:3] for row in paper.rows] == [("168", "166"), ("168", "140")]
    assert TABLE_3["svamp"].successes == (166, 140)


def test_rounds_are_those_of_the_records(shown):
    rounds = study_rounds([shown]).facts["rows"][0]["rounds"]
    assert [entry["dev_accuracy"] for entry in rounds] == [DEV_RIGHT[r] / 40 for r in range(4)]
    errors = [1 - TRAIN_RIGHT[r + 1] / 80 for r in range(3)]
    assert [entry["train_error_rate"] for entry in rounds] == [*errors, None]
    assert [entry["test_accuracy"] for entry in rounds] == [
        TEST_RIGHT[0] / 50,
        None,
        None,
        TEST_RIGHT[3] / 50,
    ]
    assert [entry["steps"] for entry in rounds] == [None, *STEPS.values()]


def test_rounds_of_seeds_are_pooled_and_drawn(shown, tmp_path):
    other = make_run(tmp_path / "other", seed=1, **WITH_FEEDBACK)
    rows = read_rows(other / "round_01" / "dev.jsonl")
    write_rows(other / "round_01" / "dev.jsonl", [row | {"correct": True} for row in rows])
    found = study_rounds([shown, other])
    (row,) = found.facts["rows"]
    assert row["rounds"][1]["dev_by_seed"] == [1.0, DEV_RIGHT[1] / 40]  # seed 1, then 42
    assert row["rounds"][1]["dev_accuracy"] == pytest.approx((1 + DEV_RIGHT[1] / 40) / 2)
    assert row["rounds"][2]["gain"] == pytest.approx(
        ((DEV_RIGHT[2] / 40 - 1) + (DEV_RIGHT[2] - DEV_RIGHT[1]) / 40) / 2
    )
    axes = found.figures["rounds"].axes
    (line,) = axes[1].lines
    assert np.asarray(line.get_xydata()).tolist() == [
        [r, 100 * (1 - TRAIN_RIGHT[r + 1] / 80)] for r in range(3)
    ]
    paths = write_findings(found, tmp_path, "rounds")
    words = texts(next(path for path in paths if path.suffix == ".svg"))
    assert {"dev accuracy, %", "training error, %", "after round", "A"} <= set(words)


def test_a_gain_is_that_of_the_seeds_that_played_both_rounds(shown, tmp_path):
    short = make_run(tmp_path / "short", seed=1, **WITH_FEEDBACK)
    for index in (2, 3):
        shutil.rmtree(short / f"round_{index:02d}")
    shutil.copy(short / "round_00" / "test.jsonl", short / "round_01" / "test.jsonl")
    result = json.loads((short / "result.json").read_text())
    write_json(short / "result.json", result | {"chosen_round": 1, "rounds": 1})
    (row,) = study_rounds([shown, short]).facts["rows"]
    assert [entry["runs"] for entry in row["rounds"]] == [2, 2, 1, 1]
    gains = [None, *((DEV_RIGHT[r] - DEV_RIGHT[r - 1]) / 40 for r in (1, 2, 3))]
    assert [entry["gain"] for entry in row["rounds"]] == pytest.approx(gains)


def test_the_papers_rounds_stand_beside_ours(tmp_path):
    run = make_run(tmp_path / "run", task={"name": "gsm8k"}, student={"model": "m"})
    table = study_rounds([run]).tables[0]
    assert table.rows[2][-3:] == ("16k", "66.2%", "+12.6")
    assert TABLE_5["gsm8k"][2].gain == 12.6


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[float, Path]:
    home = tmp_path_factory.mktemp("weights")
    runs = {
        weight: make_run(
            home / f"w{weight}",
            reflection={"weight": weight},
            task={"name": "multiarith"},
            student={"model": "m"},
        )
        for weight in (0.5, 0.0)
    }
    path = runs[0.5] / "round_03" / "metrics.jsonl"
    write_rows(path, [row | {"lm_loss": 7.0} for row in read_rows(path)])
    return runs


def test_a_setting_is_drawn_by_value_with_the_papers_figure(weights, tmp_path):
    found = study_setting(list(weights.values()))
    assert [entry["value"] for entry in found.facts["values"]] == [0.0, 0.5]
    assert found.facts["values"][1]["lm_loss_at_end"] == pytest.approx(7.0)
    assert found.facts["values"][1]["paper_accuracy"] == FIGURE_5["multiarith"][0.5] / 100
    (axes,) = found.figures["accuracy"].axes
    here = np.asarray(axes.lines[0].get_xydata()).tolist()
    assert here == [[0.0, 80.0], [0.5, 80.0]]
    paper = next(line for line in axes.lines if line.get_label() == "in the paper")
    assert dict(np.asarray(paper.get_xydata()).tolist()) == FIGURE_5["multiarith"]
    svg, png = write_figure(found.figures["loss"], tmp_path / "loss")
    words = texts(svg)
    assert "reflection.weight 0" in words and "reflection.weight 0.5" in words
    assert 'id="loss-0.5"' in svg.read_text() and png.stat().st_size > 1000


def test_the_loss_is_the_running_mean_over_all_rounds(weights):
    losses = [
        row["lm_loss"]
        for index in (1, 2, 3)
        for row in read_rows(weights[0.0] / f"round_{index:02d}" / "metrics.jsonl")
    ]
    found = study_setting([weights[0.0]])
    end = np.mean(losses[-WINDOW:])
    assert found.facts["values"][0]["lm_loss_at_end"] == pytest.approx(end)


def test_runs_that_differ_in_more_are_refused(weights, shown):
    with pytest.raises(ConfigError, match=r"more than reflection\.weight"):
        study_setting([weights[0.0], shown])
    with pytest.raises(ConfigError, match="not a knob"):
        study_setting([weights[0.0]], "reflection.wait")
    with pytest.raises(ConfigError, match="only numbers"):
        study_setting([weights[0.0]], "task.name")


def test_stories_follow_a_question_through_all_rounds(shown):
    stories = read_stories(shown)
    fates = [story.fate for story in stories.values()]
    assert fates.count(Fate.ALWAYS_RIGHT) == TRAIN_RIGHT[1]
    assert fates.count(Fate.MENDED) == TRAIN_RIGHT[3] - TRAIN_RIGHT[1]
    assert fates.count(Fate.UNMENDED) == NUM["train"] - TRAIN_RIGHT[3]
    mended = next(story for story in stories.values() if story.fate == Fate.MENDED)
    assert [chapter.attempt.correct for chapter in mended.chapters] == [False, True, True]
    assert [len(chapter.rationales) for chapter in mended.chapters] == [4, 0, 0]


def test_stories_of_several_runs_stand_under_one_question(shown, hidden):
    chosen = choose_stories([shown, hidden], fate="unmended", number=3)
    assert len(chosen) == 3 and all(len(each) == 2 for each in chosen)
    told = tell(chosen)
    assert f"A: {shown}" in told and told.count("A: unmended") == told.count("B: unmended") == 3
    assert "**A, teacher in round 2** (kept)" in told


def test_what_models_wrote_stays_a_quotation(shown):
    told = tell(choose_stories([shown], number=80))
    assert HOSTILE[0] in told and "\x1b" not in told and "\u202e" not in told
    for line in told.splitlines():
        assert "<script>" not in line or line.startswith(">     ")


def test_questions_and_fates_that_are_not_there_are_refused(shown):
    with pytest.raises(ValueError, match="only such as 'arithmetic/train/0"):
        choose_stories([shown], question="gsm8k/train/0")
    with pytest.raises(ValueError, match="one of mended, unmended, forgotten"):
        choose_stories([shown], fate="lost")


def test_the_commands_print_what_the_functions_find(shown, hidden, tmp_path):
    done = command("analyse", "feedback", shown, hidden, "--to", tmp_path, "--json")
    assert json.loads(done.stdout)["pairs"][0]["gained"] == 16
    done = command("analyse", "cases", shown, "--fate", "mended", "--number", "1")
    assert done.returncode == 0 and "A: mended" in done.stdout
    done = command("analyse", "setting", shown, "--key", "reflection.wait", "--to", tmp_path)
    assert done.returncode == 2 and "is not a knob" in done.stderr
    assert (tmp_path / "feedback.md").exists() and not (tmp_path / "setting.md").exists()
