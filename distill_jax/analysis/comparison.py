"""Rows of finished runs side by side, and whether their differences mean anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.analysis.findings import Findings
from distill_jax.analysis.paired import Difference, accuracy_interval, compare_rows, holm
from distill_jax.analysis.pooled import Row, Run, differing_knobs, pair_runs, pool, read_run
from distill_jax.analysis.rows_figure import rows_figure
from distill_jax.records import Split
from distill_jax.report.figures import letter
from distill_jax.report.headline import NOT_KNOWN, percent
from distill_jax.report.published import published_row, published_words
from distill_jax.report.tables import Table

ENOUGH_SEEDS = 5
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row against the first one.

    Attributes:
      difference: Over questions that both answered, seeds paired.
      p_value: The larger of McNemar's and the bootstrap's, raised for the number of rows by
        Holm's procedure: one knows of questions that turned, the other of seeds that differ.
      groups: The difference by kind of question; empty if there is one kind.
    """

    difference: Difference
    p_value: float
    groups: Mapping[str, Difference]

    @property
    def shown(self) -> bool:
        """Whether both tests speak for a difference, of all that were looked at together."""
        return self.p_value < SIGNIFICANT

    @property
    def words(self) -> str:
        if not self.shown:
            return "no difference shown"
        return "better" if self.difference.mean > 0 else "worse"


def compare_runs(folders: Sequence[Path], *, split: Split = "test") -> Findings:
    """Compares finished runs on the same questions; the first one's row is what others are set to.

    Args:
      folders: Finished runs. Those of one config are one row, whatever their seeds.
      split: Which exam counts.

    Raises:
      ValueError: a folder holds no finished run or none with that exam, a run is given twice, or
        two rows have no question in common.
    """
    return set_against_first(pool([read_run(folder, split) for folder in folders]), split)


def set_against_first(rows: Sequence[Row], split: Split) -> Findings:
    """Compares rows on the same questions, the first with each of the others.

    Raises:
      ValueError: two rows have no question in common.
    """
    verdicts = judge_rows(rows)
    return Findings(
        tables=[
            rows_table(rows, split),
            verdicts_table(verdicts),
            groups_table(rows, verdicts),
            settings_table(rows),
        ],
        facts={
            "split": split,
            "rows": [_row_json(row) for row in rows],
            "against_first": [_verdict_json(verdict) for verdict in verdicts],
        },
        notes=[*_split_notes(split), *_budget_notes(rows), *_seed_notes(rows)],
        figures={"accuracy": rows_figure(rows)},
    )


def judge_rows(rows: Sequence[Row]) -> list[Verdict]:
    """Every row but the first, against the first."""
    pairs = [pair_runs(rows[0], row) for row in rows[1:]]
    differences = [_difference(each) for each in pairs]
    raised = holm([max(each.p_value, each.p_bootstrap) for each in differences])
    return [
        Verdict(difference, p_value, _by_group(each))
        for difference, p_value, each in zip(differences, raised, pairs, strict=True)
    ]


def _difference(pairs: Sequence[tuple[Run, Run]], group: str | None = None) -> Difference:
    before, after = zip(*pairs, strict=True)
    return compare_rows(_marks(before, group), _marks(after, group))


def _marks(runs: Sequence[Run], group: str | None = None) -> list[dict[str, bool]]:
    """Each run's marks, of all questions or of one kind."""
    return [
        {key: mark for key, mark in run.marks.items() if group in (None, run.groups[key])}
        for run in runs
    ]


def _groups(runs: Sequence[Run]) -> list[str]:
    """The kinds of question that all runs have; none where there is only one kind."""
    kinds = set.intersection(*(set(run.groups.values()) for run in runs))
    return sorted(kinds) if len(kinds) > 1 else []


def _by_group(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Difference]:
    kinds = _groups([run for pair in pairs for run in pair])
    return {kind: _difference(pairs, kind) for kind in kinds}


def rows_table(rows: Sequence[Row], split: Split) -> Table:
    """What every row came to, and what it took."""
    cells = tuple(
        (
            letter(index),
            row.name,
            str(len(row.runs)),
            f"{len(set().union(*(run.marks for run in row.runs))):,}",
            percent(row.accuracy),
            interval_words(row.interval),
            percent(row.original),
            published_words(published_row(row.name), row.config.task.name) or NOT_KNOWN,
            f"{row.steps:,.0f}",
            f"{row.chosen_steps:,.0f}",
            f"{row.requests:,.0f}",
            f"{row.answers:,.0f}",
        )
        for index, row in enumerate(rows)
    )
    columns = (
        *("row", "name", "seeds", "questions", "accuracy", "95% interval"),
        *("original code's rule", "paper", "steps", "to the chosen round"),
        *("teacher requests", "answers asked"),
    )
    note = (
        "Means over seeds. Steps, requests and answers are those of all rounds; a request is a "
        "question that the teacher was asked about, or a rationale that it judged. The paper's "
        "number is that of the row whose name a row begins with, on the same task, with another "
        "student and another teacher; its authors copied those with a star from other papers."
    )
    return Table(f"Accuracy on {split}", columns, cells, note)


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Every row against the first."""
    cells = tuple(
        (
            letter(index),
            str(verdict.difference.num_seeds),
            *difference_cells(verdict.difference),
            p_words(verdict.p_value),
            verdict.words,
        )
        for index, verdict in enumerate(verdicts, start=1)
    )
    columns = ("row", "seeds paired", *_DIFFERENCE, "p, all rows", "verdict")
    note = (
        "Points of accuracy, on the same questions. The interval is that of the paired bootstrap "
        "over questions and seeds, for this row alone; p is McNemar's exact test with a question's "
        "seeds taken together. The second p is the larger of this and the bootstrap's, raised for "
        "the number of rows (Holm): a difference is shown where it is below 0.05."
    )
    return Table("Against row A", columns, cells, note)


_DIFFERENCE = ("difference", "95% interval", "turned right / wrong", "p")


def difference_cells(difference: Difference) -> tuple[str, ...]:
    """Points, their interval, what turned right and wrong, and p."""
    return (
        f"{100 * difference.mean:+.1f}",
        interval_words(difference.interval),
        f"{difference.num_gained:,} / {difference.num_lost:,}",
        p_words(difference.p_value),
    )


def groups_table(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Table:
    """Accuracy by kind of question: what a row gains on one kind it may forget on another."""
    cells = []
    for index, row in enumerate(rows):
        verdict = verdicts[index - 1] if index else None
        for kind in _groups(row.runs):
            marks = _marks(row.runs, kind)
            shares = [sum(each.values()) / len(each) for each in marks]
            difference = verdict.groups.get(kind) if verdict else None
            cells.append(
                (
                    f"{kind}, {letter(index)}",
                    f"{len(set().union(*marks)):,}",
                    percent(sum(shares) / len(shares)),
                    interval_words(accuracy_interval(marks)),
                    *(difference_cells(difference) if difference else [NOT_KNOWN] * 4),
                )
            )
    columns = ("kind, row", "questions", "accuracy", "95% interval", *_DIFFERENCE)
    note = "Differences from row A. These p-values are not raised for their number."
    return Table("By kind of question", columns, tuple(sorted(cells)), note)


def settings_table(rows: Sequence[Row]) -> Table:
    """The settings that are not the same in all rows."""
    found = differing_knobs(rows)
    columns = ("setting", *(letter(index) for index in range(len(rows))))
    return Table("What differs", columns, tuple((name, *values) for name, values in found.items()))


def _split_notes(split: Split) -> list[str]:
    if split == "dev":
        return ["Dev also chose the rounds and when to stop, so these accuracies flatter."]
    return []


def _budget_notes(rows: Sequence[Row]) -> list[str]:
    """A warning for everything that a row had more or less of than the first one, in any pair."""
    notes = []
    for index, row in enumerate(rows[1:], start=1):
        pairs = pair_runs(rows[0], row)
        for what, amount in _BUDGETS.items():
            amounts = [(amount(one), amount(two)) for one, two in pairs]
            unequal = sum(one != two for one, two in amounts)
            if unequal:
                first, mine = (sum(values) / len(pairs) for values in zip(*amounts, strict=True))
                notes.append(
                    f"Not at equal {what}: {letter(index)} ({row.name}) had {mine:,.1f} against "
                    f"{first:,.1f} of A ({rows[0].name}){_times(mine, first)}; "
                    f"{unequal} of {len(pairs)} pairs differ."
                )
    return notes


_BUDGETS: Mapping[str, Callable[[Run], int]] = {
    "steps": lambda run: sum(run.steps),
    "requests": lambda run: sum(run.requests),
    "answers asked": lambda run: sum(run.answers),
}


def _times(mine: float, first: float) -> str:
    return f", {mine / first:.2f} times as many" if first and mine != first else ""


def _seed_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    few = [letter(index) for index, row in enumerate(rows) if len(row.runs) < ENOUGH_SEEDS]
    if few:
        notes.append(
            f"Fewer than {ENOUGH_SEEDS} seeds in {', '.join(few)}: intervals say little of what "
            "another seed would do."
        )
    for index, row in enumerate(rows[1:], start=1):
        same = set(row.seeds) & set(rows[0].seeds)
        if same and same != set(row.seeds) | set(rows[0].seeds):
            notes.append(f"A and {letter(index)} are compared on the seeds that both have.")
        elif not same:
            notes.append(f"A and {letter(index)} have no seed in common: paired in order.")
    return notes


def interval_words(bounds: tuple[float, float]) -> str:
    """An interval of shares, in percent."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def p_words(p_value: float) -> str:
    """A p-value as tables show it."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "runs": [str(run.folder) for run in row.runs],
        "seeds": row.seeds,
        "accuracy": row.accuracy,
        "interval": list(row.interval),
        "by_seed": [run.accuracy for run in row.runs],
        "original_accuracy": row.original,
        "paper_row": published_row(row.name) or None,
        "paper_accuracy": None if row.paper is None else row.paper / 100,
        "steps": row.steps,
        "chosen_steps": row.chosen_steps,
        "teacher_requests": row.requests,
        "answers_asked": row.answers,
        "groups": {
            kind: sum(map(_share, _marks(row.runs, kind))) / len(row.runs)
            for kind in _groups(row.runs)
        },
    }


def _share(marks: Mapping[str, bool]) -> float:
    return sum(marks.values()) / len(marks)


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        **difference_json(verdict.difference),
        "p_value_all_rows": verdict.p_value,
        "verdict": verdict.words,
        "groups": {kind: difference_json(each) for kind, each in verdict.groups.items()},
    }


def difference_json(difference: Difference) -> dict[str, Any]:
    """A difference as a command prints it under `--json`."""
    return {
        "difference": difference.mean,
        "interval": list(difference.interval),
        "gained": difference.num_gained,
        "lost": difference.num_lost,
        "p_value": difference.p_value,
        "p_bootstrap": difference.p_bootstrap,
        "seeds": difference.num_seeds,
        "questions": difference.num_questions,
    }
