"""The curves and bars of the report, as SVG text.

Runs are named by letters here: what a folder is called belongs into the page around the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from distill_jax.report.round_summary import RoundSummary
from distill_jax.report.style import (
    COLOURS,
    INK,
    MARKERS,
    colour,
    marker,
    new_figure,
    percent_axis,
    styled,
    svg,
)
from distill_jax.report.summary import Summary

MAX_POINTS = 200  # of a curve; longer ones are shown as means of equal stretches


def letter(index: int) -> str:
    """What the figures call run number `index`, from 0: A to Z, then A1, B1 ..."""
    turn = index // 26
    return chr(ord("A") + index % 26) + (str(turn) if turn else "")


@styled
def rounds_figure(summary: Summary, *, run: str) -> str:
    """Accuracy after each round: on dev with its 95% interval, and on the training questions."""
    figure = new_figure(2.6)
    axes = figure.subplots()
    percent_axis(axes)
    dev = [entry for entry in summary.rounds if entry.dev]
    _plot_dev(axes, [entry.round_index for entry in dev], dev, index=0, label="dev")
    sat = [entry for entry in summary.rounds if entry.exam]
    # The exam that opens a round is sat by the weights that the round before left.
    axes.plot(
        [entry.round_index - 1 for entry in sat],
        [100 * (1 - (entry.train_error_rate or 0.0)) for entry in sat],
        color=COLOURS[1],
        marker=MARKERS[1],
        linestyle="--",
        label="training questions",
    )
    ends = _cumulative_steps(summary.rounds)
    axes.set_xticks(list(ends), [f"{r}\n{ends[r]:,}" for r in ends])
    axes.set_xlabel("round, and training steps so far")
    axes.legend(loc="best")
    return svg(figure, f"{run}-rounds")


@styled
def compare_figure(summaries: Sequence[Summary]) -> str:
    """Dev accuracy of several runs: by round, and by training steps."""
    figure = new_figure(5.0)
    by_round, by_steps = figure.subplots(2, 1)
    percent_axis(by_round)
    percent_axis(by_steps)
    for index, summary in enumerate(summaries):
        ends = _cumulative_steps(summary.rounds)
        dev = [entry for entry in summary.rounds if entry.dev and entry.round_index in ends]
        numbers = [entry.round_index for entry in dev]
        _plot_dev(by_round, numbers, dev, index=index, label=letter(index))
        _plot_dev(by_steps, [ends[r] for r in numbers], dev, index=index, label=letter(index))
    by_round.xaxis.get_major_locator().set_params(integer=True)
    by_round.set_xlabel("round")
    by_steps.set_xlabel("training steps so far")
    by_round.legend(loc="best", ncols=2)
    return svg(figure, "compare")


@styled
def funnel_figure(rounds: Sequence[RoundSummary], *, run: str) -> str:
    """From mistakes to kept rationales: one panel of bars per round that has been taught."""
    taught = [entry for entry in rounds if entry.lesson and entry.exam]
    figure = new_figure(0.2 + 1.1 * len(taught))
    panels = figure.subplots(len(taught), 1, squeeze=False, sharex=True)[:, 0]
    for panel, entry in zip(panels, taught, strict=True):
        _plot_funnel(panel, entry)
    panels[0].set_xlim(0, 1.15 * panels[0].get_xlim()[1])  # room for the numbers
    return svg(figure, f"{run}-funnel")


def _plot_funnel(panel: Axes, entry: RoundSummary) -> None:
    assert entry.exam and entry.lesson
    exam, lesson = entry.exam, entry.lesson
    bars = {
        "mistakes": exam.num_questions - exam.num_correct,
        "questions asked": lesson.num_questions,
        "answers asked": lesson.num_asked,
        "answers came": lesson.num_answered,
        "answers kept": lesson.num_kept,
    }
    colours = [COLOURS[0]] * 2 + [COLOURS[2]] * 3
    drawn = panel.barh(list(bars), list(bars.values()), color=colours, height=0.7)
    panel.bar_label(drawn, [f"{count:,}" for count in bars.values()], padding=2, fontsize=7)
    panel.grid(visible=False)
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_title(f"round {entry.round_index}", loc="left")


@styled
def loss_figure(
    rows: Mapping[int, Sequence[Mapping[str, Any]]], names: Mapping[str, str], *, run: str
) -> str:
    """Loss curves over all steps of all rounds, one panel per loss.

    Args:
      rows: By round, its logged steps in order.
      names: Keys of a logged step that hold a loss, and what to call each.
      run: The run's letter; it keeps the ids of several figures on a page apart.
    """
    height = 0.5 + 1.3 * len(names)
    figure = new_figure(height)
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for index, (panel, (key, label)) in enumerate(zip(panels, names.items(), strict=True)):
        start = 0
        for steps in rows.values():
            x, y = thin([float(row[key]) for row in steps])
            panel.plot([start + i for i in x], y, color=colour(index))
            if start:
                panel.axvline(start, color=INK, linewidth=0.6, linestyle=":")
            start += len(steps)
        panel.set_ylim(bottom=0)
        panel.set_ylabel(label)
    panels[-1].set_xlabel("training step; a dotted line: the next round begins")
    return svg(figure, "-".join((run, *names)))


def thin(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points of a curve: means over equal stretches, at their middles.

    Example:
      >>> thin([4.0, 2.0])
      ([0.0, 1.0], [4.0, 2.0])
    """
    size = -(-len(values) // MAX_POINTS) or 1
    stretches = [values[i : i + size] for i in range(0, len(values), size)]
    middles = [i * size + (len(part) - 1) / 2 for i, part in enumerate(stretches)]
    return middles, [sum(part) / len(part) for part in stretches]


def _cumulative_steps(rounds: Sequence[RoundSummary]) -> dict[int, int]:
    """Training steps taken until the end of each round whose steps are known."""
    ends, total = {}, 0
    for entry in rounds:
        if entry.steps is None and entry.round_index:
            break
        total += entry.steps or 0
        ends[entry.round_index] = total
    return ends


def _plot_dev(
    axes: Axes, x: Sequence[int], rounds: Sequence[RoundSummary], *, index: int, label: str
) -> None:
    """Dev accuracy of `rounds` at `x`, with 95% intervals."""
    marks = [entry.dev.marks for entry in rounds if entry.dev]
    axes.errorbar(
        x,
        [100 * m.accuracy for m in marks],
        yerr=[
            [100 * (m.accuracy - m.interval[0]) for m in marks],
            [100 * (m.interval[1] - m.accuracy) for m in marks],
        ],
        color=colour(index),
        marker=marker(index),
        label=label,
    )
