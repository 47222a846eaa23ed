"""What the line figures share: colours and line marks of models, and axes of lengths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from drt.eval.results import format_length
from drt.terminal import visible

# Okabe and Ito's palette, distinct to colour-blind eyes too; yellow is left out, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"  # seven of each, and lines beyond the seventh are dashed
MOST_TICKS = 7
LONGEST_NAME = 80  # characters of a name in a figure
DOTS_PER_INCH = 150
MOST_DOTS = 2**24  # of a picture: its memory is four bytes a dot


def show_name(name: str) -> str:
    """A name as a text of matplotlib that shows it: nothing in it is a formula, and only its ends if it is long."""
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 + 1 :]}"
    return visible(name, line=True).replace("$", r"\$")


def save_figure(figure: Figure, file: IO[bytes], kind: str) -> None:
    """Write a figure, of as many dots as there may be.

    Args:
        figure: made by a function of this package.
        file: open for writing.
        kind: `png`, `pdf` or `svg`.
    """
    width, height = figure.get_size_inches()
    dots = min(DOTS_PER_INCH, math.sqrt(MOST_DOTS / (width * height)), (2**16 - 1) / max(width, height))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure.savefig(file, format=kind, dpi=dots)


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
    names = [str(line.get_label()) for line in axes.lines]
    columns = max(1, min(len(names), int(width / (0.55 + 0.085 * max(map(len, names))))))
    places = [str(number) for number in range(len(names))]  # matplotlib leaves out names that begin with _
    legend = figure.legend(
        axes.lines, places, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
