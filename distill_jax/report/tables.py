"""The tables of the report, for the terminal and for the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from distill_jax.progress import duration, one_line
from distill_jax.report.figures import letter
from distill_jax.report.headline import (
    CAUTION,
    NOT_KNOWN,
    headline,
    interval,
    percent,
    spending,
    standing,
)
from distill_jax.report.marks import Marks
from distill_jax.report.round_summary import VERDICTS, RoundSummary
from distill_jax.report.summary import Summary

PAPER_NOTE = (
    " The paper's number is that of the row which the run is called after, on the same task, with "
    "another student and another teacher; with a star it was copied from others."
)
PLAIN_WIDTH = 200  # columns where there is no terminal: nothing wraps


@dataclass(frozen=True, slots=True)
class Table:
    """A table in words; its first column names the row.

    Attributes:
      title: What it shows.
      columns: C names.
      rows: Rows of C cells.
      note: What must be known to read it, or "".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def rounds_table(summary: Summary) -> Table:
    """What each round brought."""
    cells: dict[str, Callable[[RoundSummary], str]] = {
        "round": lambda r: str(r.round_index),
        "dev accuracy": lambda r: percent(r.dev_accuracy),
        "95% interval": lambda r: interval(r.dev.marks) if r.dev else NOT_KNOWN,
        "turned right / wrong": lambda r: (
            f"{r.change.num_gained:,} / {r.change.num_lost:,}" if r.change else NOT_KNOWN
        ),
        "unreadable": lambda r: _count(r.dev and r.dev.marks.num_unreadable),
        "cut": lambda r: _count(r.dev and r.dev.marks.num_cut),
        "train error before": lambda r: percent(r.train_error_rate),
        "rows trained on": lambda r: _count(r.rows),
        "with a pair": lambda r: _count(r.pairs),
        "steps": lambda r: _count(r.steps),
        "time": lambda r: duration(r.total_seconds) if r.seconds else NOT_KNOWN,
    }
    rows = tuple(tuple(cell(entry) for cell in cells.values()) for entry in summary.rounds)
    return Table(
        title="Rounds",
        columns=tuple(cells),
        rows=rows,
        note=(
            "Unreadable and cut answers on dev count as wrong. Train error is measured by the "
            "exam that opens the round; a pair is what reflection learns from."
        ),
    )


def mistakes_table(summary: Summary) -> Table:
    """What the exams on the training questions found."""
    cells: dict[str, Callable[[RoundSummary, Marks], int]] = {
        "questions": lambda r, exam: exam.num_questions,
        "mistakes": lambda r, exam: exam.num_questions - exam.num_correct,
        "unreadable": lambda r, exam: exam.num_unreadable,
        "cut": lambda r, exam: exam.num_cut,
        "wrong samples": lambda r, exam: r.num_wrong_samples,
    }
    rows = tuple(
        (str(entry.round_index), *(_count(cell(entry, entry.exam)) for cell in cells.values()))
        for entry in summary.rounds
        if entry.exam
    )
    return Table(
        title="Exams on the training questions",
        columns=("before round", *cells),
        rows=rows,
        note="Mistakes are wrong greedy answers, unreadable and cut ones among them.",
    )


def lessons_table(summary: Summary) -> Table:
    """What became of every answer that was asked of the teacher."""
    rows = tuple(
        (
            str(entry.round_index),
            _count(lesson.num_questions),
            _count(lesson.num_asked),
            *(_count(number) for number in lesson.verdicts.values()),
            _count(lesson.num_taught),
        )
        for entry in summary.rounds
        if (lesson := entry.lesson)
    )
    return Table(
        title="The teacher's answers",
        columns=("round", "asked about", "answers asked", *VERDICTS, "questions taught"),
        rows=rows,
        note=(
            "Round 1 asks about every question, later rounds about the mistakes. An answer is "
            "kept, or it is counted once under the reason why not; failed ones never came."
        ),
    )


def dropped_table(summary: Summary) -> Table:
    """Rationales that were kept and not trained on, by reason."""
    rows = tuple(
        (str(entry.round_index), one_line(reason), _count(number))
        for entry in summary.rounds
        for reason, number in entry.dropped_rows.items()
        if number
    )
    return Table("Kept, but not trained on", ("round", "reason", "rows"), rows)


def soft_table(summary: Summary) -> Table:
    """How much of what is written was learnt as several tokens, for a run that asks for it."""
    rows = tuple(
        (
            str(entry.round_index),
            _count(entry.rows),
            _count(entry.target_tokens),
            _count(entry.soft_tokens),
            percent((entry.soft_tokens or 0) / entry.target_tokens),
        )
        for entry in summary.rounds
        if entry.target_tokens and "soft" in summary.config.train.rows
    )
    return Table(
        title="Soft targets",
        columns=("round", "rows", "tokens to be written", "soft", "share"),
        rows=rows,
        note=(
            "A token is soft where the teacher said what else it found likely there, and its "
            "token and another are tokens of the student, too. All others are hard."
        ),
    )


def groups_table(summary: Summary) -> Table:
    """Dev accuracy by group of questions, round by round: forgetting shows here."""
    sat = [entry for entry in summary.rounds if entry.dev and entry.dev.groups]
    names = sorted({name for entry in sat if entry.dev for name in entry.dev.groups})
    rows = []
    for name in names:
        marks = [entry.dev.groups[name] for entry in sat if entry.dev]
        cells = (f"{percent(mark.accuracy)} ({interval(mark)})" for mark in marks)
        rows.append((one_line(name) or "no group", f"{marks[0].num_questions:,}", *cells))
    columns = ("group", "questions", *(f"round {entry.round_index}" for entry in sat))
    return Table("Dev accuracy by group", columns, tuple(rows))


def held_out_table(summary: Summary) -> Table:
    """Every finished exam on held-out questions, by our rule and by the original code's."""
    exams = [("dev", entry.round_index, entry.dev.marks) for entry in summary.rounds if entry.dev]
    exams += [("test", index, exam.marks) for index, exam in summary.test.items()]
    papers = {("test", index): summary.paper_words(index) for index in summary.test}
    known = any(papers.values())
    return Table(
        title="Held-out questions, marked by both rules",
        columns=(
            *("exam", "round", "questions", "right", "accuracy", "95% interval"),
            *("original code's rule", "unreadable", "cut"),
            *(["paper"] if known else []),
        ),
        rows=tuple(
            (
                *(split, str(index), *_marks(marks)),
                *([papers.get((split, index)) or NOT_KNOWN] if known else []),
            )
            for split, index, marks in exams
        ),
        note="The original code compares the answers' letters; we compare what they mean."
        + PAPER_NOTE * known,
    )


def _marks(marks: Marks) -> tuple[str, ...]:
    return (
        _count(marks.num_questions),
        _count(marks.num_correct),
        percent(marks.accuracy),
        interval(marks),
        percent(marks.original_accuracy),
        _count(marks.num_unreadable),
        _count(marks.num_cut),
    )


def compare_table(summaries: Sequence[Summary]) -> Table:
    """Several runs side by side."""
    rows, papers = [], [summary.paper_words(summary.chosen_round or 0) for summary in summaries]
    for index, summary in enumerate(summaries):
        lessons = [entry.lesson for entry in summary.rounds if entry.lesson]
        exams = list(summary.test.values())
        after = exams[-1].marks if len(exams) > 1 else None
        best = summary.best_dev
        rows.append(
            (
                letter(index),
                one_line(summary.name),
                summary.phase.name,
                _count(sum(entry.round_index > 0 for entry in summary.rounds)),
                percent(best.dev_accuracy if best else None),
                percent(exams[0].marks.accuracy if exams else None),
                percent(after.accuracy if after else None),
                interval(after) if after else NOT_KNOWN,
                *([papers[index] or NOT_KNOWN] if any(papers) else []),
                _count(sum(entry.steps or 0 for entry in summary.rounds)),
                _count(sum(lesson.num_asked for lesson in lessons)),
                f"${summary.spent_usd:,.4f}",
            )
        )
    return Table(
        title="Runs side by side",
        columns=(
            *("run", "name", "phase", "rounds", "best dev", "test before", "test after"),
            "95% interval",
            *(["paper"] if any(papers) else []),
            *("training steps", "answers asked", "spent"),
        ),
        rows=tuple(rows),
        note="Runs can be compared as to a cause only at equal training steps and answers asked."
        + PAPER_NOTE * any(papers),
    )


def run_tables(summary: Summary) -> list[Table]:
    """All tables of one run that have something to show."""
    makers = (
        *(rounds_table, held_out_table, groups_table),
        *(mistakes_table, lessons_table, dropped_table, soft_table),
    )
    return [table for table in (make(summary) for make in makers) if table.rows]


def print_status(summary: Summary, console: Console | None = None) -> None:
    """Prints where a run stands: one screen."""
    console = console or stdout()
    print_line(console, f"{summary.folder}: {standing(summary)}")
    print_line(console, spending(summary))
    for problem in summary.problems:
        print_line(console, f"Counts that don't add up: {problem}")
    if summary.rounds:
        print_table(console, rounds_table(summary))


def print_runs(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Prints all that is known of one run, or several runs side by side."""
    console = console or stdout()
    if len(summaries) > 1:
        print_table(console, compare_table(summaries))
    for index, summary in enumerate(summaries):
        name = f"{letter(index)}: " if len(summaries) > 1 else ""
        print_line(console, f"{name}{summary.folder}: {standing(summary)}")
        print_line(console, spending(summary))
        for problem in summary.problems:
            print_line(console, f"Counts that don't add up: {problem}")
        for table in run_tables(summary):
            print_table(console, table)
        print_line(console, headline(summary))
    print_line(console, CAUTION)


def stdout() -> Console:
    """Where results go: a terminal as wide as it is, or lines that don't wrap."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def print_line(console: Console, text: str) -> None:
    """Prints one line of text that says nothing to the terminal."""
    console.print(Text(one_line(text)), soft_wrap=not console.is_terminal)


def print_table(console: Console, table: Table) -> None:
    """Names to the left, numbers to the right; markup in a cell is only text."""
    grid = rich.table.Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    if table.note:
        grid.caption, grid.caption_justify = Text(table.note), "left"
    for index, column in enumerate(table.columns):
        grid.add_column(Text(column), justify="right" if index else "left")
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)


def _count(number: int | None) -> str:
    return NOT_KNOWN if number is None else f"{number:,}"
