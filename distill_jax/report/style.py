"""How every figure looks: on paper at column width, on a white page or a dark one.

Colours are Okabe and Ito's, which people with any sort of colour blindness can tell apart, and each
series has a marker of its own, so that a figure can be read without any colour.
"""

import io
import re
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Yellow and black are left out, since a page may be white or dark.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#010203"  # stands for the page's own text colour, which `svg` puts in
WIDTH = 4.2  # inches: one column of the page, and a phone held upright
DPI = 300  # of pictures in points, as journals ask for

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "errorbar.capsize": 2,
    "font.size": 8,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

styled = rc_context(STYLE)
"""Decorates what draws a figure."""


def new_figure(height: float) -> Figure:
    """An empty figure, one column wide and so many inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def colour(index: int) -> str:
    """The colour of series number `index`, from 0; they repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of series number `index`, from 0; they repeat after the last."""
    return MARKERS[index % len(MARKERS)]


def percent_axis(axes: Axes, label: str = "accuracy, %") -> None:
    """Makes the axis that goes up one of shares, from 0 to 100%."""
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(label)


def svg(figure: Figure, name: str) -> str:
    """The figure as an element to put into a page; `name` goes in front of its ids.

    The same numbers always give the same text.
    """
    element = _draw_svg(figure)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    return element.replace(INK, "currentColor")


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes `{stem}.svg` and `{stem}.png`, both on white."""
    drawn = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    element = _draw_svg(figure).replace(INK, "#000000")
    drawn[0].write_text(element.replace(">", f">\n {white}", 1), encoding="utf-8")
    with rc_context(STYLE):
        figure.savefig(drawn[1], dpi=DPI, facecolor="white", metadata={"Software": None})
    return list(drawn)


def _draw_svg(figure: Figure) -> str:
    out = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": "always the same ids"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
