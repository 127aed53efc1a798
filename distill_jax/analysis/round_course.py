"""What each round brought, seeds pooled: the paper's table 5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill_jax.analysis.findings import Findings
from distill_jax.analysis.pooled import Row, pool, read_run
from distill_jax.report.figures import letter
from distill_jax.report.headline import NOT_KNOWN, percent
from distill_jax.report.published import TABLE_5
from distill_jax.report.style import colour, marker, new_figure, percent_axis, styled
from distill_jax.report.summary import Summary, summarise
from distill_jax.report.tables import Table


@dataclass(frozen=True, slots=True)
class RoundMeans:
    """A round of a row: means over the seeds that played it; None where nobody measured.

    Attributes:
      round_index: 0 is the untrained student.
      num_runs: Seeds that played it.
      rows: Rationales trained on.
      error_rate: On the training questions, of the student that the round left.
      dev: Dev accuracy of that student, of each seed.
      gain: Of dev accuracy in the round, of the seeds that have both.
      test: Its test accuracy, of the seeds whose result it is, and of round 0.
      steps: Updates.
    """

    round_index: int
    num_runs: int
    rows: float | None
    error_rate: float | None
    dev: tuple[float, ...]
    gain: float | None
    test: tuple[float, ...]
    steps: float | None


def study_rounds(folders: Sequence[Path]) -> Findings:
    """Data, training error and accuracy round by round.

    The error rate is that of the exam which opens the next round, so the last round has none.

    Args:
      folders: Finished runs; those of one config are pooled.

    Raises:
      ValueError: a folder holds no finished run.
    """
    rows = pool([read_run(folder) for folder in folders])
    courses = {letter(index): read_course(row) for index, row in enumerate(rows)}
    names = {letter(index): row.name for index, row in enumerate(rows)}
    tasks = {letter(index): row.config.task.name for index, row in enumerate(rows)}
    return Findings(
        tables=[
            _course_table(f"{key}: {names[key]}", course, tasks[key])
            for key, course in courses.items()
        ],
        facts={
            "rows": [
                {"name": names[key], "rounds": [_means_json(entry) for entry in course]}
                for key, course in courses.items()
            ]
        },
        figures={"rounds": course_figure(courses)},
    )


def read_course(row: Row) -> list[RoundMeans]:
    """The rounds that any of a row's runs has played."""
    summaries = [summarise(run.folder) for run in row.runs]
    last = max(len(summary.rounds) for summary in summaries)
    return [_means(summaries, index) for index in range(last)]


def _means(summaries: Sequence[Summary], index: int) -> RoundMeans:
    played = [summary for summary in summaries if len(summary.rounds) > index]
    rounds = [summary.rounds[index] for summary in played]
    following = [summary.rounds[index + 1 : index + 2] for summary in played]
    return RoundMeans(
        round_index=index,
        num_runs=len(played),
        rows=_mean([entry.rows for entry in rounds]),
        error_rate=_mean([entry.train_error_rate for after in following for entry in after]),
        dev=tuple(entry.dev_accuracy for entry in rounds if entry.dev_accuracy is not None),
        gain=_mean([_gain(summary, index) for summary in played]),
        test=tuple(
            summary.test[index].marks.accuracy for summary in played if index in summary.test
        ),
        steps=_mean([entry.steps for entry in rounds]),
    )


def _gain(summary: Summary, index: int) -> float | None:
    """What one run's dev accuracy gained in a round."""
    pair = [entry.dev_accuracy for entry in summary.rounds[max(0, index - 1) : index + 1]]
    match pair:
        case [float(before), float(after)]:
            return after - before
    return None


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _course_table(name: str, course: Sequence[RoundMeans], task: str) -> Table:
    paper = TABLE_5.get(task, ())
    rows = []
    for entry in course:
        told = paper[entry.round_index] if entry.round_index < len(paper) else None
        rows.append(
            (
                str(entry.round_index),
                str(entry.num_runs),
                _count(entry.rows),
                percent(entry.error_rate),
                percent(_mean(entry.dev)),
                NOT_KNOWN if entry.gain is None else f"{100 * entry.gain:+.1f}",
                percent(_mean(entry.test)),
                _count(entry.steps),
                *(
                    (
                        NOT_KNOWN if told.rows is None else f"{told.rows:g}k",
                        f"{told.error_rate:.1f}%",
                        f"{told.gain:+.1f}" if entry.round_index else f"{told.gain:.1f}%",
                    )
                    if told
                    else ((NOT_KNOWN,) * 3 if paper else ())
                ),
            )
        )
    columns = ("round", "runs", "rows", "train error after", "dev", "gain", "test", "steps")
    columns += ("paper: rows", "paper: train error", "paper: test gain") if paper else ()
    note = (
        "Means over the seeds that played the round; the gain is from their own rounds before it. "
        "The training error is that of the exam which opens the next round; test is sat by the "
        "untrained student and the result only."
    )
    return Table(name, columns, tuple(rows), note)


def _count(number: float | None) -> str:
    return NOT_KNOWN if number is None else f"{number:,.0f}"


def _means_json(entry: RoundMeans) -> dict[str, Any]:
    return {
        "round": entry.round_index,
        "runs": entry.num_runs,
        "rows": entry.rows,
        "train_error_rate": entry.error_rate,
        "dev_accuracy": _mean(entry.dev),
        "gain": entry.gain,
        "dev_by_seed": list(entry.dev),
        "test_accuracy": _mean(entry.test),
        "steps": entry.steps,
    }


@styled
def course_figure(courses: Mapping[str, Sequence[RoundMeans]]) -> Figure:
    """Dev accuracy and training error after each round, a line per row; bars from seed to seed."""
    figure = new_figure(4.4)
    above, below = figure.subplots(2, 1, sharex=True)
    for index, (name, course) in enumerate(courses.items()):
        look: dict[str, Any] = {"color": colour(index), "marker": marker(index), "label": name}
        sat = [entry for entry in course if entry.dev]
        means = [100 * float(np.mean(entry.dev)) for entry in sat]
        least = [mean - 100 * min(entry.dev) for mean, entry in zip(means, sat, strict=True)]
        most = [100 * max(entry.dev) - mean for mean, entry in zip(means, sat, strict=True)]
        spread = np.maximum([least, most], 0.0)
        above.errorbar([entry.round_index for entry in sat], means, yerr=spread, **look)
        measured = [entry for entry in course if entry.error_rate is not None]
        errors = [100 * (entry.error_rate or 0.0) for entry in measured]
        below.plot([entry.round_index for entry in measured], errors, **look)
    percent_axis(above, "dev accuracy, %")
    percent_axis(below, "training error, %")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlabel("after round")
    above.legend(loc="best")
    return figure
