"""The commands as users type them: quick help, one object with --json, clear sentences."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shell import command

from distill_jax.questions import prepare


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from distill_jax.cli import app; "
        "print(CliRunner().invoke(app, ['--help']).output); "
        "heavy = {'jax', 'numpy', 'transformers', 'openai', 'pydantic', 'matplotlib'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    names = "run exam status report compare sweep analyse tutor data ledger import export"
    for name in names.split():
        assert f" {name} " in done.stdout


def test_help_of_a_group_of_commands_ends_well():
    done = command("analyse", "--help")
    assert done.returncode == 0 and " feedback " in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "nowhere.yaml"], "config nowhere.yaml can't be read"),
        (["run", "{config}", "train.epochz=3"], "did you mean train.epochs?"),
        (["status", "nowhere"], "nowhere holds no run"),
        (["export", "nowhere", "--to", "out"], "nowhere holds no run"),
        (["data", "prepare", "gsm9k"], "gsm9k"),
        (["compare", "nowhere"], "nowhere holds no run"),
        (["compare", "nowhere", "--split", "train"], "--split is test or dev"),
        (["sweep", "seed=1,2"], "a sweep needs a config"),
        (["sweep", "{config}", "seeed=1,2"], "did you mean seed?"),
        (["analyse", "rounds", "nowhere"], "nowhere holds no run"),
        (["exam", "nowhere", "--task", "svamp", "--split", "best"], "'best' is not one of"),
        (["run"], "Missing argument"),
    ],
)
def test_mistakes_get_one_sentence_exit_code_2_and_write_nothing(
    tmp_path: Path, words: list[str], sentence: str
):
    config = tmp_path / "c.yaml"
    folder = tmp_path / "run"
    config.write_text(f"folder: {folder}\ntask: {{name: gsm8k}}\nstudent: {{model: m}}\n")
    done = command(*(word.format(config=config) for word in words))
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not folder.exists()


def test_exam_of_a_real_model_on_real_questions(shared: Path, tmp_path: Path):
    prepare("svamp", data_dir=tmp_path, source=shared / "data")
    settings = ["task.num_test=5", "task.demonstrations=[]", "exam.max_new_tokens=[24, 24]"]
    model = shared / "models" / "stories260k"
    words = ("--task", "svamp", "--votes", "2", "--json", *settings)
    done = command("exam", model, *words, DISTILL_JAX_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["questions"] == 5 and 0 < result["generated_tokens"] <= 5 * 24 * 3
    assert 0.0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1.0
    assert {"unreadable", "cut", "seconds"} <= set(result)
    assert result["votes"] == 2
    assert 0.0 <= result["majority_accuracy"] <= result["pass_at_k"] <= 1.0


def test_the_tutor_serves_until_it_is_interrupted():
    words = [sys.executable, "-m", "distill_jax", "tutor", "--task", "arithmetic", "--port", "0"]
    process = subprocess.Popen(
        [*words, "task.num_train=5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 14 and "Traceback" not in err, err


def test_import_keeps_a_model_as_a_student_directory(shared: Path, tmp_path: Path):
    model = shared / "models" / "babyllama-361"
    done = command("import", model, "--to", tmp_path / "student", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(tmp_path / "student")
    again = command("import", tmp_path / "student", "--to", tmp_path / "student")
    assert again.returncode == 2 and "is not empty" in again.stderr
