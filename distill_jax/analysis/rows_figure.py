"""The accuracy of rows of runs, drawn: means with intervals, every seed, the paper's number."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from distill_jax.analysis.pooled import Row
from distill_jax.report.figures import letter
from distill_jax.report.style import INK, colour, marker, new_figure, styled


@styled
def rows_figure(rows: Sequence[Row]) -> Figure:
    """One line per row: the mean with its 95% interval, a dot per seed, the paper's as a cross."""
    figure = new_figure(0.8 + 0.32 * len(rows))
    axes = figure.subplots()
    for index, row in enumerate(rows):
        low, high = row.interval
        mean = 100 * row.accuracy
        axes.errorbar(
            [mean],
            [index],
            xerr=[[max(0.0, mean - 100 * low)], [max(0.0, 100 * high - mean)]],
            color=colour(index),
            marker=marker(index),
            gid=f"row-{letter(index)}",
        )
        if len(row.runs) > 1:
            each = [100 * run.accuracy for run in row.runs]
            axes.plot(each, [index + 0.25] * len(each), ".", color=colour(index), alpha=0.6)
    paper = [(row.paper, index) for index, row in enumerate(rows) if row.paper is not None]
    if paper:
        x, y = zip(*paper, strict=True)
        axes.plot(x, y, "x", color=INK, label="in the paper")
        axes.legend(loc="best")
    axes.set_yticks(range(len(rows)), [f"{letter(i)}  {row.name}" for i, row in enumerate(rows)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("accuracy, %")
    return figure
