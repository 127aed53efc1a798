"""Tables as files: Markdown to read, LaTeX for a paper, CSV for a spreadsheet."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from distill_jax.progress import one_line
from distill_jax.report.tables import Table
from distill_jax.run_folder import write_text

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def to_markdown(table: Table) -> str:
    """The table with its title and note; numbers stand to the right.

    Example:
      >>> print(to_markdown(Table("Marks", ("run", "right"), (("A|B", "4"),))))
      **Marks**
      <BLANKLINE>
      | run | right |
      |:--|--:|
      | A\\|B | 4 |
      <BLANKLINE>
    """
    rules = [":--", *["--:"] * (len(table.columns) - 1)]
    lines = [f"**{plain_markdown(table.title)}**", "", _line(table.columns), f"|{'|'.join(rules)}|"]
    lines += [_line(row) for row in table.rows]
    note = ["", plain_markdown(table.note)] if table.note else []
    return "\n".join([*lines, *note]) + "\n"


def to_latex(table: Table) -> str:
    """The table as a `table` environment; needs the package booktabs.

    Example:
      >>> print(to_latex(Table("Marks", ("run", "right"), (("A & B", "4%"),))))
      \\begin{table}
      \\centering
      \\caption{Marks}
      \\begin{tabular}{lr}
      \\toprule
      run & right \\\\
      \\midrule
      A \\& B & 4\\% \\\\
      \\bottomrule
      \\end{tabular}
      \\end{table}
      <BLANKLINE>
    """
    caption = f"{table.title}. {table.note}" if table.note else table.title
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        _latex_line(table.columns),
        r"\midrule",
        *map(_latex_line, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """The columns' names and the rows.

    Example:
      >>> print(to_csv(Table("Marks", ("run", "right"), (("A, B", "4"),))))
      run,right
      "A, B",4
      <BLANKLINE>
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        [one_line(cell) for cell in row] for row in (table.columns, *table.rows)
    )
    return out.getvalue()


def write_tables(tables: Sequence[Table], stem: Path) -> list[Path]:
    """Writes all tables into `{stem}.md` and `{stem}.tex`, and each into a CSV file.

    The first CSV file is `{stem}.csv`, the second `{stem}_2.csv` and so on.
    """
    texts = {f"{stem.name}.{ending}": "\n".join(map(write, tables)) for ending, write in _WHOLE}
    for number, table in enumerate(tables, start=1):
        place = f"_{number}" if number > 1 else ""
        texts[f"{stem.name}{place}.csv"] = to_csv(table)
    for name, text in texts.items():
        write_text(stem.with_name(name), text)
    return [stem.with_name(name) for name in texts]


_WHOLE = (("md", to_markdown), ("tex", to_latex))


def plain_markdown(text: str) -> str:
    """One line that Markdown takes for plain text, in a table too."""
    plain = re.sub(r"([\\|`*\[\]#~])", r"\\\1", one_line(text))
    return plain.replace("<", "&lt;")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(plain_markdown, cells))} |"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(map(_latex, cells))} \\\\"
