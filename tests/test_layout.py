"""The house plan holds: imports point up, the student is pure, every file has its place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import distill_jax

PACKAGE = Path(distill_jax.__file__).parent
PLAN = """
records on_demand chips config config_file endings processes bucket claim numerals answers
questions.raw_files questions.equations questions.rows questions.published questions.prepared
questions.own_file questions.arithmetic questions contamination
int_lists prompts tokenizer
student.sharding student.architecture student.attention student.blocks student.encoder_decoder
student.model student.lora
student.losses student.tree student.plain student.objective student.flops student.step
student.sampling student.decode
families.table families.fields families.llama families.mistral families.qwen2 families.qwen3
families.gemma2 families.gemma3 families.gpt2 families.gpt_neo families.gptj families.gpt_neox
families.opt families.t5 families
families.layout families.config_json families.stored families.pickled families.files families.arrays
weights adapters layouts
run_folder mirror progress sinks checkpoint slots engine generate exam
teacher.ledger teacher.reply teacher.audit teacher.governor teacher.dialect teacher.secret
teacher.account teacher.clerk teacher.transport teacher.asking
teacher.batch_book teacher.batching teacher.client
teacher.lesson teacher.explanation teacher.tutor
packing plain_packing soft_targets rows batches scratch
report.published report.files report.marks report.phase report.round_summary report.summary
report.settings report.cases report.style report.figures report.headline report.tables
report.table_files report.page
ballot interrupts teaching syllabus training school resit
plan.teacher plan.work plan.memory plan.savings plan.program plan.topology plan.fit plan.page
rounds model_card exchange replay
analysis.findings analysis.paired analysis.pooled analysis.rows_figure analysis.comparison
analysis.sweep analysis.sweep_report analysis.feedback analysis.round_course analysis.setting
analysis.stories analysis.paths analysis.reflection analysis.state_map analysis.judging
analysis.transfer analysis.voting
machine run_arguments ledger_commands analysis_commands
membership cluster shelter cli __main__
"""
ORDER = PLAN.split()
HOST_ONLY = {"os", "pathlib", "time", "logging", "random", "socket", "sqlite3", "httpx", "openai"}
PACKAGES_ONLY = {"student", "teacher", "report", "analysis", "plan", ""}  # holding a docstring


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in PACKAGES_ONLY:
            found[name] = path
    return found


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place():
    assert sorted(modules()) == sorted(ORDER)


def test_imports_point_up():
    rank = {name: i for i, name in enumerate(ORDER)}
    for name, path in modules().items():
        for target in imports(path):
            target = target.removeprefix("distill_jax.")
            if target in rank and target != name:
                assert rank[target] < rank[name], f"{name} imports {target}, which is not above it"


def test_student_is_pure():
    for name, path in modules().items():
        if name.startswith("student."):
            roots = {target.split(".")[0] for target in imports(path)}
            assert not roots & HOST_ONLY, f"{name} is traced by jit and may not touch the host"


def test_only_the_teacher_touches_the_network_of_endpoints():
    for name, path in modules().items():
        if not name.startswith("teacher."):
            assert "openai" not in {target.split(".")[0] for target in imports(path)}, name


def test_only_the_reader_of_pickles_needs_torch():
    needing = {
        name
        for name, path in modules().items()
        if "torch" in {target.split(".")[0] for target in imports(path)}
    }
    assert needing == {"families.pickled"}


def test_the_report_never_needs_a_device():
    for name, path in modules().items():
        if name.startswith("report."):
            assert not {target.split(".")[0] for target in imports(path)} & {"jax", "flax"}, name


def test_functions_and_files_stay_short():
    for name, path in modules().items():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                words = ast.get_docstring(node, clean=False) or ""
                length = (node.end_lineno or node.lineno) - node.lineno - words.count("\n")
                assert length <= 60, f"{name}.{node.name} has {length} lines without its docstring"
