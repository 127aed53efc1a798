"""The report: one HTML page that needs nothing else, for one run or several side by side.

Whatever a model, a file or a folder's name says is escaped by the template and made printable
first; the page holds no script and allows none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill_jax.progress import one_line, printable
from distill_jax.report.cases import RoundCases, read_cases, shorten
from distill_jax.report.figures import (
    MAX_POINTS,
    compare_figure,
    funnel_figure,
    letter,
    loss_figure,
    rounds_figure,
)
from distill_jax.report.files import read_stage, round_folders
from distill_jax.report.headline import CAUTION, headline, spending, standing
from distill_jax.report.settings import beyond_paper, flatten, given
from distill_jax.report.summary import Summary, read_questions, summarise
from distill_jax.report.tables import Table, compare_table, run_tables
from distill_jax.run_folder import write_text

LOSSES = {"lm_loss": "LM loss", "reflection_loss": "reflection loss"}


@dataclass(frozen=True, slots=True)
class Figure:
    """An SVG element and what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class RunSection:
    """What the template shows of one run."""

    letter: str
    summary: Summary
    headline: str
    standing: str
    spending: str
    figures: Sequence[Figure]
    tables: Sequence[Table]
    rounds: Sequence[RoundCases]
    settings: Sequence[tuple[str, str, str]]
    given: Sequence[tuple[str, str]]
    provenance: Sequence[tuple[str, str]]


def write_page(folders: Sequence[Path], path: Path) -> Path:
    """Writes the report of one run or several.

    Args:
      folders: Run folders, at least one, finished or not.
      path: The page; replaced as a whole if it exists.

    Returns:
      `path`.

    Raises:
      ValueError: a folder holds no run, or a file in it can't be read.
    """
    write_text(path, make_page(folders))
    return path


def make_page(folders: Sequence[Path]) -> str:
    """The report as HTML; see `write_page`."""
    summaries = [summarise(folder) for folder in folders]
    sections = [_section(index, summary) for index, summary in enumerate(summaries)]
    several = len(summaries) > 1
    environment = Environment(
        loader=PackageLoader("distill_jax", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, one_line=one_line, shorten=_shorten)
    html = environment.get_template("page.html.jinja").render(
        title=" and ".join(one_line(summary.name) for summary in summaries),
        sections=sections,
        caution=CAUTION,
        comparison=compare_table(summaries) if several else None,
        comparison_figure=_comparison_figure(summaries) if several else None,
    )
    return html.lstrip()


def _shorten(text: str) -> str:
    return printable(shorten(text))


def _section(index: int, summary: Summary) -> RunSection:
    questions = read_questions(summary.folder)
    return RunSection(
        letter=letter(index),
        summary=summary,
        headline=headline(summary),
        standing=standing(summary),
        spending=spending(summary),
        figures=list(_figures(summary, letter(index))),
        tables=run_tables(summary),
        rounds=read_cases(summary.folder, questions) if questions else [],
        settings=beyond_paper(summary.config),
        given=given(summary.config),
        provenance=list(flatten(summary.manifest)),
    )


def _figures(summary: Summary, run: str) -> Iterator[Figure]:
    """The figures that the run has numbers for."""
    if any(entry.dev or entry.exam for entry in summary.rounds):
        yield Figure(
            Markup(rounds_figure(summary, run=run)),
            "Accuracy of the weights after each round, with 95% intervals on dev. Accuracy on the "
            "training questions is that of the exam which opens the next round.",
        )
    if any(entry.exam and entry.lesson for entry in summary.rounds):
        yield Figure(
            Markup(funnel_figure(summary.rounds, run=run)),
            "From mistakes to kept rationales. Blue bars count questions, green bars the teacher's "
            "answers, several to a question.",
        )
    logged = {
        index: stage.rows
        for index, path in round_folders(summary.folder).items()
        if (stage := read_stage(path, "metrics", dict)) and stage.rows
    }
    taught = {index: rows for index, rows in logged.items() if index}
    names = {
        key: label
        for key, label in LOSSES.items()
        if taught
        and all(key in row for rows in taught.values() for row in rows)
        and any(row[key] for rows in taught.values() for row in rows)
    }
    if names:
        yield Figure(
            Markup(loss_figure(taught, names, run=run)),
            f"Training losses; where there are more than {MAX_POINTS} steps in a round, means of "
            "equal stretches of steps.",
        )
    if 0 in logged:
        yield Figure(
            Markup(loss_figure({0: logged[0]}, {"loss": "loss"}, run=run)),
            "Pretraining of the student, before round 1.",
        )


def _comparison_figure(summaries: Sequence[Summary]) -> Figure:
    return Figure(
        Markup(compare_figure(summaries)),
        "Dev accuracy with 95% intervals: by round, and by training steps, which is the fairer "
        "view. Letters are those of the table.",
    )
