"""The configs that are shipped, and the knobs that they turn."""

import ast
from pathlib import Path

import pytest

import distill_jax
from distill_jax import rounds, scratch
from distill_jax.config import SCRATCH, SELF, TEACHER, Config, knobs
from distill_jax.config_file import load_config
from distill_jax.plan.teacher import plan_teacher
from distill_jax.progress import Progress
from distill_jax.questions import load_questions, prepare
from distill_jax.report.page import write_page
from distill_jax.report.summary import status_json, summarise
from distill_jax.student.sharding import make_mesh
from distill_jax.teaching import asks_teacher

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PACKAGE = Path(distill_jax.__file__).parent
TASK = "svamp"  # its questions are short, and one task's shapes are compiled once
TINY = (
    *("task.num_train=12", "task.num_test=2", "task.dev_fraction=0.1", "scratch=[16, 1, 2]"),
    *("student.compute_dtype=float32", "exam.slots=8", "exam.max_new_tokens=[6, 6]"),
    *("train.batch_size=4", "train.microbatch_size=4", "train.warmup_steps=0", "mesh.fsdp=1"),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_says_what_it_is(path: Path):
    load_config(path)
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 60
    assert any("distill-jax run" in line for line in header), "the header names the command"
    assert not any(part in path.read_text() for part in ("../", "/home", "/root"))


def test_every_knob_is_read_by_somebody():
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [name for name in knobs() if name.split(".")[-1] not in read]
    assert not unread, f"knobs that nobody reads: {unread}"


@pytest.fixture(scope="session")
def prepared(shared: Path, tmp_path_factory) -> Path:
    """The question set that all rows of the paper run on here."""
    folder = tmp_path_factory.mktemp("questions")
    prepare(TASK, data_dir=folder, source=shared / "data")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A student that reads arithmetic and knows nothing."""
    folder = tmp_path_factory.mktemp("tiny") / "student"
    config = load_config(ROOT / "configs" / "quickstart.yaml", TINY)
    questions = load_questions(config.task, seed=config.seed, data_dir=folder)
    mesh = make_mesh(1, 1, 1)
    scratch.make_student(config, folder, questions=questions, mesh=mesh, progress=Progress())
    return folder


def shrink(path: Path, *settings: str) -> Config:
    """A shipped config so small that it runs in seconds, with the tutor for a teacher."""
    config = load_config(path)
    given = [*TINY, *settings, f"rounds.max={min(config.rounds.max, 2)}", "rounds.patience=2"]
    given += [f"train.steps={[min(steps, 2) or 2 for steps in config.train.steps[:2]]}"]
    given += [f"teacher.samples={min(config.teacher.samples, 2)}"]
    if config.teacher.url != SELF:
        given += ["teacher.url=tutor", "teacher.model=tutor", "teacher.price_usd=null"]
    if config.student.model == TEACHER:
        given += [f"student.model={TEACHER}"]
    return load_config(path, given)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_is_planned_and_runs(
    path: Path, prepared: Path, shared, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTILL_JAX_DATA", str(prepared))
    config = load_config(path)
    lab = config.task.name == "arithmetic"
    model = tiny if lab else shared / "models" / "stories260k"
    given = [] if config.student.model == SCRATCH else [f"student.model={model}"]
    # the little model's context holds no worked examples
    given += [] if lab else [f"task.name={TASK}", "task.demonstrations=[]"]
    small = shrink(path, f"folder={tmp_path / 'run'}", *given)
    plan = plan_teacher(small)
    assert plan.free and (plan.requests.low > 0) == asks_teacher(small)
    rounds.run(small)
    summary = summarise(tmp_path / "run")
    facts = status_json(summary)
    assert facts["phase"] == "done" and facts["problems"] == []
    trained = [entry["steps"] for entry in facts["rounds"] if entry["steps"]]
    assert trained == [2] * facts["rounds"][-1]["round"] or small.teacher.url == SELF
    write_page([tmp_path / "run"], tmp_path / "run" / "report.html")
