"""Students of one task examined on others: the paper's table 11."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_jax.analysis.findings import Findings
from distill_jax.analysis.pooled import read_run
from distill_jax.config import Config
from distill_jax.config_file import override
from distill_jax.progress import Progress, one_line
from distill_jax.report.headline import NOT_KNOWN, percent
from distill_jax.report.published import TABLE_11, TASKS
from distill_jax.report.summary import row_name
from distill_jax.report.tables import Table
from distill_jax.resit import examine
from distill_jax.run_folder import read_json, write_json

DONE = "transfer_exams.json"


def study_transfer(
    folders: Sequence[Path],
    tasks: Sequence[str],
    settings: Sequence[str] = (),
    *,
    progress: Progress,
) -> Findings:
    """Examines the untrained student, that of round 1 and the chosen one on the tests of tasks.

    Every exam that has ended is kept in `analysis/transfer_exams.json` of its run; the same call
    goes on after it.

    Args:
      folders: Finished runs, each taught one task.
      tasks: Names of tasks, or question files; each is asked with its own demonstrations, and all
        of its test questions are, but those of a run's own task that the run has.
      settings: `key.sub=value` for all exams, such as `exam.max_new_tokens=[256,128]`.
      progress: Where to show it.

    Raises:
      ConfigError: a task has no test questions, or a setting is not allowed.
      ValueError: a folder holds no finished run.
    """
    lines = []
    for folder in folders:
        run = read_run(folder)
        for index in sorted({0, min(1, run.chosen_round), run.chosen_round}):
            marks = {
                task: _examine(folder, run.config, task, settings, index, progress)
                for task in tasks
            }
            lines.append((folder, run.config.task.name, index, run.chosen_round, marks))
    return Findings(
        tables=[_table(lines, tasks)],
        facts={
            "exams": [
                {"run": str(folder), "taught": taught, "round": index, "task": task, **mark}
                for folder, taught, index, _, marks in lines
                for task, mark in marks.items()
            ]
        },
    )


def _examine(
    folder: Path,
    config: Config,
    task: str,
    settings: Sequence[str],
    round_index: int,
    progress: Progress,
) -> dict[str, Any]:
    """One exam, or what it came to when it was taken before."""
    whole = [] if task == config.task.name else ["task.num_test=0"]
    asked = override(config, [f"task.name={json.dumps(task)}", *whole, *settings])
    parts = [part.model_dump(mode="json") for part in (asked.task, asked.exam, asked.student)]
    key = json.dumps([round_index, asked.seed, *parts])
    path = folder / "analysis" / DONE
    done = read_json(path)
    if key not in done:
        path.parent.mkdir(exist_ok=True)
        done[key] = examine(asked, folder, split="test", round_index=round_index, progress=progress)
        write_json(path, done)
    return done[key]


def _table(lines: Sequence[tuple], tasks: Sequence[str]) -> Table:
    rows = []
    for folder, taught, index, chosen, marks in lines:
        rows.append(
            (
                f"{row_name(folder)} ({one_line(taught)}), after round {index}",
                *(_cell(marks[task]) for task in tasks),
            )
        )
        told = TABLE_11.get(_paper_row(taught, index, chosen))
        if told and set(tasks) & set(TASKS):
            paper = dict(zip(TASKS, told, strict=True))
            name = f"in the paper: {_paper_row(taught, index, chosen)}"
            rows.append((name, *(f"{paper[t]:.1f}%" if t in paper else NOT_KNOWN for t in tasks)))
    columns = ("taught, and when", *(one_line(Path(task).name) for task in tasks))
    note = "Test accuracy with its 95% interval; each task with its own demonstrations."
    return Table("Taught one task, examined on others", columns, tuple(rows), note)


def _paper_row(taught: str, index: int, chosen: int) -> str:
    if not index:
        return "none"
    return f"{taught} {'last' if index == chosen and chosen > 1 else 'first'}"


def _cell(mark: dict[str, Any]) -> str:
    return f"{percent(mark['accuracy'])} ({100 * mark['low']:.1f} to {100 * mark['high']:.1f})"
