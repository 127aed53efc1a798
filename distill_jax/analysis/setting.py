"""What one setting does when nothing else changes: the paper's figures 5 and 6."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill_jax.analysis.comparison import Verdict, interval_words, judge_rows, p_words
from distill_jax.analysis.findings import Findings
from distill_jax.analysis.pooled import Row, identity, pool, read_run
from distill_jax.config import Config, ConfigError, knobs
from distill_jax.report.figures import thin
from distill_jax.report.files import read_stage, round_folders
from distill_jax.report.headline import NOT_KNOWN, percent
from distill_jax.report.published import FIGURE_5
from distill_jax.report.style import INK, colour, marker, new_figure, styled
from distill_jax.report.tables import Table

WEIGHT = "reflection.weight"
WINDOW = 100
"""Steps that the loss is averaged over, as in the paper's figure 6."""


def study_setting(folders: Sequence[Path], key: str = WEIGHT) -> Findings:
    """Accuracy and the language-modelling loss by the value of one setting.

    Args:
      folders: Finished runs that differ in this setting and their seeds alone.
      key: The setting, a number.

    Raises:
      ConfigError: no such setting, it is not a number, or the runs differ in others, too.
      ValueError: a folder holds no finished run.
    """
    if key not in knobs():
        raise ConfigError(f"{key} is not a knob.")
    rows = pool([read_run(folder) for folder in folders])
    if len({identity(row.config, besides=(key,)) for row in rows}) > 1:
        raise ConfigError(f"these runs differ in more than {key}; give those that don't.")
    by_value = {_number(row.config, key): row for row in rows}
    by_value = {value: by_value[value] for value in sorted(by_value)}
    losses = {value: mean_losses(row) for value, row in by_value.items()}
    task = rows[0].config.task.name
    paper = FIGURE_5.get(task, {}) if key == WEIGHT else {}
    verdicts = [None, *judge_rows([*by_value.values()])]  # the first has none
    figures = {"accuracy": accuracy_figure(by_value, key, paper)}
    if any(losses.values()):
        figures["loss"] = loss_figure(losses, key)
    return Findings(
        tables=[_values_table(by_value, verdicts, losses, key, paper)],
        facts={
            "setting": key,
            "values": [
                {
                    "value": value,
                    "seeds": row.seeds,
                    "accuracy": row.accuracy,
                    "interval": list(row.interval),
                    "lm_loss_at_end": losses[value][-1] if losses[value] else None,
                    "p_value_all_rows": verdict.p_value if verdict else None,
                    "paper_accuracy": paper[value] / 100 if value in paper else None,
                }
                for (value, row), verdict in zip(by_value.items(), verdicts, strict=True)
            ],
        },
        figures=figures,
    )


def _number(config: Config, key: str) -> float:
    value = reduce(getattr, key.split("."), config)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} is {value!r} in {config.folder}; only numbers can be drawn.")
    return float(value)


def mean_losses(row: Row) -> list[float]:
    """The language-modelling loss by step over all rounds, the mean over seeds, running over 100.

    As long as the shortest run; a step's value is the mean of it and of up to 99 before.
    """
    each = [_read_losses(run.folder) for run in row.runs]
    length = min(map(len, each))
    values = np.mean([losses[:length] for losses in each], axis=0)
    sums = np.concatenate([np.zeros(1), np.cumsum(values)])
    ends = np.arange(1, length + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _read_losses(folder: Path) -> list[float]:
    stages = [read_stage(path, "metrics", dict) for i, path in round_folders(folder).items() if i]
    return [row["lm_loss"] for stage in stages if stage for row in stage.rows]


def _values_table(
    rows: Mapping[float, Row],
    verdicts: Sequence[Verdict | None],
    losses: Mapping[float, Sequence[float]],
    key: str,
    paper: Mapping[float, float],
) -> Table:
    cells = tuple(
        (
            f"{value:g}",
            str(len(row.runs)),
            percent(row.accuracy),
            interval_words(row.interval),
            f"{100 * verdict.difference.mean:+.1f}" if verdict else NOT_KNOWN,
            interval_words(verdict.difference.interval) if verdict else NOT_KNOWN,
            p_words(verdict.p_value) if verdict else NOT_KNOWN,
            f"{losses[value][-1]:.4f}" if losses[value] else NOT_KNOWN,
            f"{paper[value]:.1f}%" if value in paper else NOT_KNOWN,
        )
        for (value, row), verdict in zip(rows.items(), verdicts, strict=True)
    )
    columns = (
        *(key, "seeds", "accuracy", "95% interval", "from the first", "its 95% interval"),
        *("p, all rows", "LM loss at the end", "paper"),
    )
    note = (
        "Test accuracy, the mean over seeds, and each row against the first as `compare` judges "
        f"them. The loss is the mean of the last {WINDOW} steps."
    )
    return Table(f"Accuracy by {key}", columns, cells, note)


@styled
def accuracy_figure(rows: Mapping[float, Row], key: str, paper: Mapping[float, float]) -> Figure:
    """Accuracy by the setting's value, with 95% intervals; the paper's beside it."""
    figure = new_figure(2.4)
    axes = figure.subplots()
    means = [100 * row.accuracy for row in rows.values()]
    spread = [
        [max(0.0, m - 100 * row.interval[0]) for m, row in zip(means, rows.values(), strict=True)],
        [max(0.0, 100 * row.interval[1] - m) for m, row in zip(means, rows.values(), strict=True)],
    ]
    axes.errorbar(list(rows), means, spread, color=colour(0), marker=marker(0), label="here")
    if paper:
        axes.plot(list(paper), list(paper.values()), "x--", color=INK, label="in the paper")
        axes.legend(loc="best")
    axes.set_xlabel(key)
    axes.set_ylabel("test accuracy, %")
    return figure


@styled
def loss_figure(losses: Mapping[float, Sequence[float]], key: str) -> Figure:
    """The language-modelling loss by step, a line per value."""
    figure = new_figure(2.4)
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for index, (value, curve) in enumerate(losses.items()):
        x, y = thin(curve)
        look: dict[str, Any] = {"color": colour(index), "linestyle": styles[index % len(styles)]}
        axes.plot(x, y, label=f"{key} {value:g}", gid=f"loss-{value:g}", **look)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"training step; mean of {WINDOW}")
    axes.set_ylabel("LM loss")
    axes.legend(loc="best")
    return figure
