"""Looking after a ledger: what is shown, what is found wrong, what may go."""

import json
import sqlite3
from pathlib import Path
from random import Random

import pytest
import yaml
from asked import CENT_PER_THOUSAND, Outcome
from fault_server import Call, Says, chat, error
from typer.testing import CliRunner, Result

from distill_jax.config_file import load_config
from distill_jax.ledger_commands import ledger
from distill_jax.progress import Progress
from distill_jax.records import Attempt, Question
from distill_jax.run_folder import read_rows, write_records
from distill_jax.teacher.audit import (
    collect_garbage,
    export,
    read_failures,
    read_model_uses,
    read_totals,
    verify,
)
from distill_jax.teacher.audit import (
    read_rows as ledger_rows,
)
from distill_jax.teaching import teach

REAL = (50 + 20) * 10 / 1e6


def mixed(call: Call) -> Says:
    """Failures, another model's name, and one answer without usage."""
    if call.prompt == "p1" and not call.again:
        return error(503)
    changes = {"usage": None} if call.prompt == "p2" else {}
    return Says(body=chat(call, model="m-2024", **changes))


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A ledger of four answers and one failure."""
    prompts = [f"p{i}" for i in range(4)]
    priced = {"price_usd": CENT_PER_THOUSAND, "budget_usd": 1.0, "url": "tutor"}
    return Outcome(tmp_path, mixed, prompts, **priced).path


def test_uses_of_a_model(used: Path):
    (use,) = read_model_uses(used)
    assert (use.endpoint, use.model, use.served_models) == ("tutor", "m", ("m-2024",))
    assert dict(use.finish_reasons) == {"stop": 8}
    assert (use.num_answers, use.num_estimated) == (4, 1)
    worst = (2 + 64 + 2 * 128) * 10 / 1e6
    assert use.spent_usd == pytest.approx(3 * REAL + worst)
    assert read_failures(used) == {"server error": 1}


def test_every_answer_is_exported_with_all_that_is_known(used: Path, tmp_path: Path):
    assert export(used, tmp_path / "out.jsonl") == 4
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows == list(ledger_rows(used))
    row = next(row for row in rows if row["request"]["body"]["messages"][0]["content"] == "p1")
    assert row["attempts"] == 2 and row["served_model"] == "m-2024" and row["settled"]
    assert row["slots"] == [0, 1] and row["finish_reasons"] == ["stop", "stop"]
    assert row["spent_usd"] == pytest.approx(REAL) and row["usage"]["prompt_tokens"] == 50
    assert json.loads(row["raw"])["choices"][1]["message"]["content"] == "answer 1 to p1"
    assert row["received"] >= row["started"] > 1.7e9 and row["latency_s"] > 0
    assert list(tmp_path.glob(".*")) == []


def test_a_sound_ledger_is_sound_and_everything_else_is_named(used: Path):
    assert verify(used) == []
    changes = {
        "UPDATE answers SET raw = raw || ' ' WHERE intent = 1": "answer 1 is not the one that came",
        "UPDATE requests SET request = replace(request, 'p3', 'p4')": "not the one that was sent",
        "UPDATE total SET spent = spent - 7": "7 billionths of a dollar are not accounted for",
        "UPDATE intents SET spent = spent + 9 WHERE id = 2": "9 billionths",
        "DELETE FROM requests": "4 answers have lost the text",
        "INSERT INTO failures SELECT intent, key, 'x', '', 0, 0 FROM answers LIMIT 1": "both an",
    }
    for change, sentence in changes.items():
        whole = used.read_bytes()
        with sqlite3.connect(used) as database:
            database.execute("PRAGMA foreign_keys = OFF")
            database.execute(change)
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        problems = verify(used)
        assert any(sentence in problem for problem in problems), (change, problems)
        used.write_bytes(whole)
    assert verify(used) == []


def test_garbage_goes_answers_and_sums_stay(used: Path, tmp_path: Path):
    again = Outcome(tmp_path, lambda _: error(500), ["bad", "p1"], url="tutor")
    assert again.raised is not None
    before, rows = read_totals(used), list(ledger_rows(used))
    gone = collect_garbage(used)
    assert gone["failures"] == before.num_failures > 1 and gone["requests"] == 1
    after = read_totals(used)
    assert after.spent_usd == before.spent_usd and after.num_answers == before.num_answers
    assert list(ledger_rows(used)) == rows and verify(used) == []
    with pytest.raises(FileNotFoundError):
        collect_garbage(tmp_path / "nowhere")


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(ledger, [*map(str, words)])


def test_the_commands(used: Path, tmp_path: Path):
    shown = json.loads(command("show", tmp_path, "--json").stdout)
    assert shown["num_answers"] == 4 and shown["failures"] == {"server error": 1}
    assert shown["models"][0]["served_models"] == ["m-2024"]
    done = command("show", used)
    assert done.exit_code == 0 and "model m, served models m-2024" in done.stdout
    assert json.loads(command("verify", tmp_path, "--json").stdout) == {
        "sound": True,
        "problems": [],
    }
    done = command("export", tmp_path, "--to", tmp_path / "x.jsonl", "--json")
    assert json.loads(done.stdout)["answers"] == 4 and len(read_rows(tmp_path / "x.jsonl")) == 4
    assert json.loads(command("gc", tmp_path, "--json").stdout)["failures"] == 1
    with sqlite3.connect(used) as database:
        database.execute("UPDATE answers SET raw = 'x' WHERE intent = 1")
    database.close()
    done = command("verify", tmp_path)
    assert done.exit_code == 1 and "answer 1 is not the one that came" in done.stdout
    done = command("show", tmp_path / "nowhere")
    assert isinstance(done.exception, ValueError) and "has no ledger" in str(done.exception)
    assert done.stdout == ""


def test_32_a_damaged_file_is_one_sentence(used: Path, tmp_path: Path):
    torn, random = bytearray(used.read_bytes()), Random(1)
    for _ in range(2000):
        torn[random.randrange(100, len(torn))] ^= 0xFF
    used.write_bytes(torn)
    for word in ("show", "verify", "gc"):
        done = command(word, tmp_path)
        assert done.exit_code == 1 and isinstance(done.exception, ValueError | SystemExit)
        assert "damaged" in f"{done.stdout} {done.exception}"


def test_replay_reads_a_lesson_again_for_nothing(tmp_path: Path):
    config = tmp_path / "config.yaml"
    task = {"name": "arithmetic", "num_train": 12}
    config.write_text(
        yaml.safe_dump({"folder": str(tmp_path), "task": task, "student": {"model": "m"}})
    )
    questions = [
        Question(
            f"q/{i}", f"{i} + 1?", str(i + 1), "train", "numeric", solution=f"{i} + 1 = {i + 1}."
        )
        for i in range(6)
    ]
    write_records(tmp_path / "questions.jsonl", questions)
    attempts = [Attempt(q.id, 0, 0, "It is 0.\nAnswer: 0", "0", False, False, 9) for q in questions]
    for index in (1, 2):
        folder = tmp_path / f"round_0{index}"
        folder.mkdir()
        write_records(folder / "exam.jsonl", attempts)
        lesson = teach(
            load_config(config),
            tmp_path,
            questions,
            attempts,
            round_index=index,
            progress=Progress(quiet=True),
        )
        write_records(folder / "lesson.jsonl", lesson)
    before = read_totals(tmp_path / "ledger.sqlite")
    done = command("replay", tmp_path, "--json", "--to", tmp_path / "now.jsonl")
    assert done.exit_code == 0, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert [entry["changed"] for entry in rounds] == [0, 0]
    assert all(entry["then"] == entry["now"] for entry in rounds)
    lessons = [read_rows(tmp_path / f"round_0{i}" / "lesson.jsonl") for i in (1, 2)]
    assert read_rows(tmp_path / "now.jsonl") == [*lessons[0], *lessons[1]]
    assert read_totals(tmp_path / "ledger.sqlite") == before
    # a lesson that a worse reader had written
    changed = [{**row, "verdict": "unreadable", "answer": None} for row in lessons[0]]
    path = tmp_path / "round_01" / "lesson.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    rounds = json.loads(command("replay", tmp_path, "--json").stdout)["rounds"]
    assert rounds[0]["changed"] == len(lessons[0]) and rounds[0]["now"]["kept"] > 0
    assert set(rounds[0]["then"]) == {"unreadable"} and rounds[1]["changed"] == 0
