"""One report of a sweep: how each member ended, and the finished ones compared."""

from collections.abc import Sequence
from typing import Any

from distill_jax.analysis.comparison import compare_runs
from distill_jax.analysis.findings import Findings
from distill_jax.analysis.sweep import Member
from distill_jax.progress import one_line
from distill_jax.report.tables import Table
from distill_jax.run_folder import read_json


def report_sweep(members: Sequence[Member]) -> Findings:
    """How the members ended, then a comparison of the finished ones for each task.

    Test exams are compared, or dev's for a task where a member has sat no test.
    """
    tasks = dict.fromkeys(member.config.task.name for member in members if member.finished)
    comparisons = {task: _compare(members, task) for task in tasks}
    tables, notes, figures = [_members_table(members)], [], {}
    for task, found in comparisons.items():
        prefix = f"{task}: " if len(tasks) > 1 else ""
        tables += [
            Table(f"{prefix}{table.title}", table.columns, table.rows, table.note)
            for table in found.tables
        ]
        notes += [f"{prefix}{note}" for note in found.notes]
        place = f"{list(tasks).index(task) + 1}_" if len(tasks) > 1 else ""
        figures |= {f"{place}{name}": figure for name, figure in found.figures.items()}
    facts = {
        "members": [_member_json(member) for member in members],
        "comparisons": {task: found.facts for task, found in comparisons.items()},
    }
    return Findings(tables, facts, notes, figures)


def _compare(members: Sequence[Member], task: str) -> Findings:
    folders = [
        member.folder for member in members if member.finished and member.config.task.name == task
    ]
    tested = all((folder / "test.jsonl").exists() for folder in folders)
    return compare_runs(folders, split="test" if tested else "dev")


def _members_table(members: Sequence[Member]) -> Table:
    rows = tuple((one_line(str(member.folder)), _ending(member)) for member in members)
    return Table("Runs of the sweep", ("run", "ending"), rows)


def _ending(member: Member) -> str:
    if member.finished:
        return one_line(str(read_json(member.folder / "result.json")["stop_reason"]))
    return "not run" if member.exit_code is None else f"failed with exit code {member.exit_code}"


def _member_json(member: Member) -> dict[str, Any]:
    return {
        "folder": str(member.folder),
        "exit_code": member.exit_code,
        "finished": member.finished,
    }
