"""What an analysis came to, and where it is put: a terminal, one JSON object, files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill_jax.report.style import write_figure
from distill_jax.report.table_files import write_tables
from distill_jax.report.tables import Table, print_line, print_table, stdout


@dataclass(frozen=True, slots=True)
class Findings:
    """What an analysis came to.

    Attributes:
      tables: Those that have rows are shown.
      facts: The same for programs: JSON-ready, shares and not percentages.
      notes: Sentences that must be read with the tables.
      figures: By name.
    """

    tables: Sequence[Table]
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)


def write_findings(findings: Findings, folder: Path, name: str) -> list[Path]:
    """Writes tables as Markdown, LaTeX and CSV, figures as SVG and PNG, the facts as JSON.

    Args:
      findings: What to write.
      folder: Where to; made if absent.
      name: What the files' names begin with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_tables([table for table in findings.tables if table.rows], folder / name)
    if findings.notes:
        with (folder / f"{name}.md").open("a", encoding="utf-8") as file:
            file.write("".join(f"\n{note}\n" for note in findings.notes))
    for figure_name, figure in findings.figures.items():
        paths += write_figure(figure, folder / f"{name}_{figure_name}")
    facts = folder / f"{name}.json"
    facts.write_text(to_json_text(findings) + "\n", encoding="utf-8")
    return [*paths, facts]


def print_findings(findings: Findings) -> None:
    """Prints tables and notes for a reader."""
    console = stdout()
    for table in findings.tables:
        if table.rows:
            print_table(console, table)
    for note in findings.notes:
        print_line(console, note)


def to_json_text(findings: Findings) -> str:
    """The facts and notes as one JSON object on one line."""
    return json.dumps({**findings.facts, "notes": list(findings.notes)}, ensure_ascii=False)
