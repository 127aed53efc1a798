"""The report of a run whose every count is known beforehand, at every moment of its life."""

import dataclasses
import io
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from sample_run import (
    DEV_RIGHT,
    NUM,
    begin,
    dump,
    run_stages,
    sample_config,
    sample_questions,
    sit,
    write_run,
)

from distill_jax.config_file import to_yaml
from distill_jax.records import Attempt, Question
from distill_jax.report.cases import CASES_PER_ROUND
from distill_jax.report.figures import thin
from distill_jax.report.headline import CAUTION, headline
from distill_jax.report.marks import Change, compare, mark, wilson
from distill_jax.report.page import make_page, write_page
from distill_jax.report.settings import beyond_paper
from distill_jax.report.summary import status_json, summarise
from distill_jax.report.tables import compare_table, held_out_table, print_runs, print_status
from distill_jax.run_folder import round_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "sample & <i>run\x1b[31m", longest=5_000_000)


@pytest.fixture(scope="module")
def page(run) -> str:
    return make_page([run])


class Page(HTMLParser):
    """What a browser would make of a page: its tags in order, their attributes, its words."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.words.append(data)


def test_numbers_are_those_that_were_put_in(run):
    summary = summarise(run)
    assert summary.num_questions == NUM
    assert summary.problems == ()
    assert summary.spent_usd == pytest.approx(0.01 * (80 + 50 + 25))
    for entry, index in zip(summary.rounds, range(4), strict=True):
        assert entry.dev_accuracy == DEV_RIGHT[index] / 40
        assert entry.round_index == index
    second = summary.rounds[2]
    assert second.train_error_rate == 50 / 80
    assert second.num_exam_rows == 240 and second.num_wrong_samples == 160
    assert second.exam and (second.exam.num_unreadable, second.exam.num_cut) == (10, 5)
    lesson = second.lesson
    assert lesson and (lesson.num_questions, lesson.num_asked, lesson.num_answered) == (
        50,
        200,
        180,
    )
    expected = {"kept": 100, "wrong": 20, "unreadable": 20, "cut": 20, "duplicate": 20}
    assert lesson.verdicts == {**expected, "leak": 0, "failed": 20}
    assert lesson.num_taught == 40  # every fifth question has the first four verdicts
    assert (second.rows, second.pairs, second.steps) == (98, 91, 90)
    assert second.total_seconds == 167.0
    assert second.change == Change(num_gained=12, num_lost=0)
    assert summary.test_change == Change(num_gained=37, num_lost=0)
    assert summary.test[3].marks.accuracy == 0.8


def test_groups_and_the_original_rule(run):
    exam = summarise(run).rounds[1].dev  # 14 of 40 right: 7 even and 7 odd ones
    assert exam
    assert {name: (m.num_correct, m.num_questions) for name, m in exam.groups.items()} == {
        "2 steps": (7, 20),
        "3 steps <b>": (7, 20),
    }
    assert exam.marks.num_original == 14
    question = Question(id="a", text="?", answer="1000", split="dev", kind="numeric")
    attempt = Attempt("a", 0, 0, "\nAnswer: 1000.0", "1000", True, False, 3)
    marks = mark([attempt], {"a": question})
    assert (marks.num_correct, marks.num_original) == (1, 0)


def test_every_moment_of_a_run_can_be_reported(tmp_path):
    folder = tmp_path / "run"
    seen = set()
    for name, round_index, num_done in run_stages(folder):
        summary = summarise(folder)
        phase = summary.phase
        assert (phase.name, phase.round_index, phase.num_done) == (name, round_index, num_done)
        assert status_json(summary)["phase"] == name
        print_status(summary, Console(file=io.StringIO()))
        print_runs([summary], Console(file=io.StringIO()))
        if name not in seen:  # drawing takes longest
            assert "<main>" in make_page([folder])
        seen.add(name)
    assert len(seen) == 7


def test_a_run_that_stopped_early_sits_its_test(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = sample_config(folder, rounds={"max": 9})
    (folder / "config.yaml").write_text(to_yaml(config))
    for name in ("result.json", "test.jsonl"):
        (folder / name).unlink()
    assert summarise(folder).phase.name == "test exam"
    for path in folder.glob("round_*/test.jsonl"):
        path.unlink()
    phase = summarise(folder).phase
    assert (phase.name, phase.round_index, phase.num_total) == ("exam", 4, 80)


def test_nothing_is_claimed_of_an_exam_in_progress(tmp_path):
    folder = tmp_path / "run"
    for name, round_index, _ in run_stages(folder):
        if (name, round_index) == ("exam", 2):
            break
    begin(round_folder(folder, 2) / "exam.jsonl", dump(sit(sample_questions()[:80], 80, 1, 2)))
    summary = summarise(folder)
    assert summary.rounds[2].exam is None and summary.rounds[2].train_error_rate is None
    assert summary.stop_reason is None and summary.test == {}
    assert "dev also chooses the round, so this flatters" in make_page([folder])


def test_status_json_is_json(run):
    status = json.loads(json.dumps(status_json(summarise(run)), allow_nan=False))
    assert status["phase"] == "done" and status["stop_reason"] == "the limit of 3 rounds"
    assert status["spent_usd"] == pytest.approx(1.55)
    assert [entry["round"] for entry in status["rounds"]] == [0, 1, 2, 3]
    assert [entry["dev_accuracy"] for entry in status["rounds"]] == [0.05, 0.35, 0.65, 0.825]
    assert [entry["train_error_rate"] for entry in status["rounds"]] == [None, 0.95, 0.625, 0.3125]
    assert [entry["rows"] for entry in status["rounds"]] == [None, 158, 98, 48]
    assert [entry["seconds"] for entry in status["rounds"]] == [0.0, 167.0, 167.0, 167.0]


def test_a_missing_attempt_is_reported(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    path = round_folder(folder, 2) / "exam.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    (problem,) = summarise(folder).problems
    assert "make 240 attempts; exam.jsonl has 239." in problem
    assert problem in " ".join(Page(make_page([folder])).words)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (1, 7), (7, 7), (640, 1319), (3, 50)])
def test_wilson_bounds_solve_their_equation(right, n):
    for bound, edge in zip(wilson(right, n), (0.0, 1.0), strict=True):
        if right / n == edge:
            assert bound == pytest.approx(edge, abs=1e-12)
        else:  # a bound lies 1.96 of its own standard errors away from what was seen
            deviation = abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert deviation == pytest.approx(1.959964, abs=1e-5)


def test_mcnemar_counts_and_test():
    before = [Attempt(str(i), 0, 0, "", "", i < 5, False, 0) for i in range(20)]
    after = [Attempt(str(i), 1, 0, "", "", i >= 3 and i < 13, False, 0) for i in range(19)]
    assert compare(before, after) == Change(num_gained=8, num_lost=3)
    assert Change(8, 3).p_value == pytest.approx(2 * (1 + 11 + 55 + 165) / 2048)
    assert Change(4, 4).p_value == 1.0 and Change(0, 0).p_value == 1.0


def test_page_holds_no_foreign_element_and_no_control_character(page):
    parsed = Page(page)
    assert parsed.open == []
    names = {name for name, _ in parsed.tags}
    assert names.isdisjoint({"script", "img", "iframe", "object", "link", "b", "i", "base"})
    attributes = [pair for _, pairs in parsed.tags for pair in pairs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name == "autofocus"]
    page.encode()
    assert not set("\x1b\x07\x9b\u202e\u2066\u2028\ud800") & set(page)
    assert "sample & <i>run" in parsed.words
    words = " ".join(parsed.words)
    for text in (
        "</script><script>alert(1)</script>",
        "{{ 7 * 7 }}",
        "[bold]x[/bold]",
        "&lt;b&gt;",
    ):
        assert text in words


def test_page_fetches_nothing(page):
    parsed = Page(page)
    policy = [pairs for name, pairs in parsed.tags if name == "meta" and "http-equiv" in pairs]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for _, pairs in parsed.tags:
        for name, value in pairs.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value and value.startswith("#")
            if value and "url(" in value:
                assert "url(#" in value
    styles = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in styles and "@import" not in styles


def test_ids_are_unique_over_all_figures(run):
    ids = [pairs["id"] for _, pairs in Page(make_page([run, run])).tags if "id" in pairs]
    assert len(ids) > 20 and len(ids) == len(set(ids))


def test_page_is_short_and_says_what_it_leaves_out(page):
    assert len(page) < 3_000_000
    assert "4,998,000 more characters" in page
    assert f"76 mistakes, 26 of them right after the round; {CASES_PER_ROUND} shown" in page
    assert "16 not shown" in page
    assert "25 mistakes; 25 shown" in page


def test_page_says_what_it_must(page):
    words = " ".join(" ".join(Page(page).words).split())
    low, high = (100 * bound for bound in wilson(40, 50))
    assert f"80.0% (95% interval {low:.1f} to {high:.1f}) after round 3" in words
    assert "37 answers turned right and 0 turned wrong (McNemar's exact test: p < 0.001)" in words
    assert "Rounds and training steps rise together" in words
    assert "Why it stopped: the limit of 3 rounds" in words
    assert "spent $1.55" in words
    assert "exam.samples 4 2" in words and "train.epochs" not in words
    assert "mesh.data 1" in words


def test_the_same_run_gives_the_same_page(run, page):
    assert make_page([run]) == page


def test_runs_side_by_side(run, tmp_path):
    other = tmp_path / "half"
    for name, round_index, _ in run_stages(other):
        if (name, round_index) == ("training", 2):
            break
    path = write_page([run, other], tmp_path / "both.html")
    words = " ".join(Page(path.read_text()).words)
    assert "Runs side by side" in words and "Run B" in words
    assert "no test exam" in words.lower()
    rows = compare_table([summarise(run), summarise(other)]).rows
    # Steps and answers: of the half run only those of the round whose training has ended.
    assert [row[4:7] for row in rows] == [("82.5%", "6.0%", "80.0%"), ("35.0%", "-", "-")]
    assert [row[-3:] for row in rows] == [("690", "620", "$1.5500"), ("150", "520", "$1.3000")]
    out = io.StringIO()
    print_runs([summarise(run), summarise(other)], Console(file=out, width=200))
    assert "Runs side by side" in out.getvalue() and CAUTION in out.getvalue()


def test_the_papers_number_stands_beside_ours_where_row_and_task_are_published(tmp_path):
    folder = write_run(tmp_path / "specializing" / "seed=1", longest=100)
    ours = write_run(tmp_path / "specializing" / "seed=2", longest=100)  # on arithmetic

    def teach(task: str) -> None:
        config = sample_config(folder, task={"name": task}, student={"model": "m"})
        (folder / "config.yaml").write_text(to_yaml(config))

    teach("svamp")
    page = Page(make_page([folder, ours]))
    table = held_out_table(summarise(folder))
    assert table.columns[-1] == "paper"
    assert [row[-1] for row in table.rows] == ["-"] * 4 + ["20.7%", "35.6%*"]
    assert "20.7%" in page.words and page.words.count("35.6%*") == 2
    both = compare_table([summarise(folder), summarise(ours)])
    at = both.columns.index("paper")
    assert both.columns[at - 1] == "95% interval"
    assert [row[at] for row in both.rows] == ["35.6%*", "-"]
    teach("csqa")  # which that row has no number for
    for summary in (summarise(folder), summarise(ours)):
        assert "paper" not in held_out_table(summary).columns
        assert "paper" not in compare_table([summary]).columns


def test_the_terminal_gets_words_only(run):
    out = io.StringIO()
    summary = summarise(run)
    print_runs([summary], Console(file=out, width=200))
    print_status(summary, Console(file=out, width=200))
    assert not set("\x1b\x07\x9b\u202e\u2066") & set(out.getvalue())
    assert "3 steps <b>" in out.getvalue() and "too long <b>" in out.getvalue()


@pytest.mark.parametrize(
    ("model", "rounds", "who", "why"),
    [
        ("teacher", 1, "The teacher is", "questions."),
        ("gpt2", 1, "The untrained student is", "questions."),
        ("gpt2", 3, "The untrained student is", "questions: no round did better on dev."),
    ],
)
def test_a_result_without_training_says_whose_it_is(run, tmp_path, model, rounds, who, why):
    summary = summarise(run)
    teacher = {"url": "http://localhost:1/v1"}
    untrained = dataclasses.replace(
        summary,
        config=sample_config(
            tmp_path, student={"model": model}, rounds={"max": rounds - 1}, teacher=teacher
        ),
        rounds=summary.rounds[:rounds],
        test={0: summary.test[0]},
    )
    assert headline(untrained).startswith(who) and headline(untrained).endswith(why)


def test_settings_beyond_the_paper(tmp_path):
    teacher = {"url": "https://me:secret@teacher.example/v1?key=k", "price_usd": [0.0, 0.0]}
    config = sample_config(tmp_path, teacher=teacher, train={"rows": ["new", "old"]})
    settings = {name: (old, new) for name, old, new in beyond_paper(config)}
    assert settings["reflection.weight"] == ("0.5", "0.1")
    assert settings["train.rows"] == ("new", "new, old")
    assert settings["teacher.url"] == ("tutor", "https://teacher.example/v1")
    assert "folder" not in settings and "seed" not in settings
    assert "secret" not in str(settings) and "key" not in str(settings)


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: a run folder has a config\.yaml\."):
        summarise(tmp_path)


def test_a_broken_line_is_named(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    path = round_folder(folder, 1) / "dev.jsonl"
    path.write_text(path.read_text().replace('"answer"', '"reply"', 1))
    said = r"round_01/dev\.jsonl, line 1 is not a row .* Move it and result\.json, .* and run again"
    with pytest.raises(ValueError, match=said):
        summarise(folder)


def test_thinned_curves_keep_their_mean():
    x, y = thin([float(i * i % 97) for i in range(1000)])
    assert len(x) == len(y) == 200
    assert sum(y) / 200 == pytest.approx(sum(i * i % 97 for i in range(1000)) / 1000)
    assert (x[0], x[-1]) == (2.0, 997.0)
