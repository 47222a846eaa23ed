"""What the line figures share: colours and line marks of models, and axes of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from drt.eval.results import format_length

# Okabe and Ito's palette, distinct to colour-blind eyes too; yellow is left out, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"  # seven of each, and lines beyond the seventh are dashed
MOST_TICKS = 7


def line_style(number: int) -> dict[str, Any]:
    """Colour, mark and dash of the model of that number, from 0; they repeat after 14."""
    turn = number % len(COLOURS)
    dash = "-" if number // len(COLOURS) % 2 == 0 else "--"
    return {"color": COLOURS[turn], "marker": MARKERS[turn], "linestyle": dash}


def format_position(tokens: float) -> str:
    """A length for an axis: 512, 1K, 64K, 1M, and 1.5K for what lies between."""
    whole = round(tokens)
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if whole >= unit and whole % unit:
            return f"{tokens / unit:.3g}{name}"
    return format_length(whole)


def length_axis(axes: Axes, lengths: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at (some of) the lengths."""
    ordered = sorted(set(lengths))
    step = -(-len(ordered) // MOST_TICKS)
    shown = ordered[::-1][::step][::-1]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([format_position(length) for length in shown])


def tidy(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def legend_below(figure: Figure, axes: Axes, width: float) -> None:
    """The names of the lines of `axes` under all panels; `width` is the figure's, in inches."""
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(width / (0.55 + 0.085 * longest))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
