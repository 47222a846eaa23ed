"""Needle records as a picture: accuracy by length of the text and depth of the needle."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from drt.eval.results import NeedleRecord, format_length
from drt.plotting.style import show_name

MAX_DEPTH_BINS = 10
COLOURS = matplotlib.colormaps["cividis"]  # even in lightness, and the same to colour-blind eyes
NO_DATA = "#e8e8e8"


def plot_needles(records: Sequence[NeedleRecord]) -> Figure:
    """A heat map of accuracy, length x depth; one panel a task, one row of panels a checkpoint.

    Each cell shows the percentage of right answers; below each length stands how many of its samples were answered
    right, over all depths. Depth is cut into as many equal bins as there are depths at the length that has the fewest,
    ten at most.

    Args:
        records: needle records, at least one.

    Returns:
        A figure of its own, with no global state; `style.save_figure` writes it.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("expected at least one needle record to draw, got none")
    tasks = list(dict.fromkeys(record.task for record in records))
    checkpoints = list(dict.fromkeys(record.checkpoint for record in records))
    lengths = sorted({record.length for record in records})
    bins = _count_depth_bins(records)
    panel_width, panel_height = max(2.4, 0.75 * len(lengths)), max(1.4, 0.32 * bins) + 0.9
    size = (panel_width * len(tasks) + 2.1, panel_height * len(checkpoints) + 0.5)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
    grid = figure.subplots(len(checkpoints), len(tasks), squeeze=False, sharey=True)
    for axes_row, checkpoint in zip(grid, checkpoints, strict=True):
        for axes, task in zip(axes_row, tasks, strict=True):
            chosen = [record for record in records if (record.checkpoint, record.task) == (checkpoint, task)]
            _draw_panel(axes, chosen, lengths, bins)
            shown = show_name(task)
            axes.set_title(
                shown if len(checkpoints) == 1 else f"{show_name(checkpoint)}: {shown}", fontsize=11
            )
    if len(checkpoints) == 1:
        figure.suptitle(f"Needles found by {show_name(checkpoints[0])}", fontsize=12)
    figure.supylabel("depth of the needle", fontsize=10)
    figure.supxlabel("tokens of text, and answers right of all asked", fontsize=10)
    colours = ScalarMappable(Normalize(0, 100), COLOURS)
    bar = figure.colorbar(colours, ax=grid, ticks=range(0, 101, 25), aspect=16 * len(checkpoints))
    bar.set_label("answers right (%)", fontsize=10)
    bar.outline.set_visible(False)
    return figure


def accuracy_grid(records: Sequence[NeedleRecord], lengths: Sequence[int], bins: int) -> NDArray[np.float64]:
    """Percentage right, (bins, len(lengths)); NaN where there is no sample. Row 0 is the start of the text."""
    right, total = np.zeros((bins, len(lengths))), np.zeros((bins, len(lengths)))
    for record in records:
        cell = min(int(record.depth * bins), bins - 1), lengths.index(record.length)
        right[cell] += record.correct
        total[cell] += 1
    return np.divide(100 * right, total, out=np.full_like(right, np.nan), where=total > 0)


def _count_depth_bins(records: Sequence[NeedleRecord]) -> int:
    depths: dict[tuple[str, str, int], set[float]] = {}
    for record in records:
        depths.setdefault((record.checkpoint, record.task, record.length), set()).add(record.depth)
    return min(MAX_DEPTH_BINS, *(len(found) for found in depths.values()))


def _draw_panel(axes: Axes, records: Sequence[NeedleRecord], lengths: Sequence[int], bins: int) -> None:
    values = accuracy_grid(records, lengths, bins)
    axes.patch.set(facecolor=NO_DATA, hatch="////", edgecolor="white")
    edges = np.arange(len(lengths) + 1) - 0.5, np.linspace(0, 1, bins + 1)
    axes.pcolormesh(*edges, values, cmap=COLOURS, vmin=0, vmax=100, edgecolors="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if value < 50 else "black"
            axes.text(
                column, (row + 0.5) / bins, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=9
            )
    axes.set_ylim(1, 0)  # the start of the text on top
    ticks = np.linspace(0, 1, min(bins, 5) + 1 if bins < 10 else 6)
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xticks(range(len(lengths)), [_length_label(records, length) for length in lengths], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _length_label(records: Sequence[NeedleRecord], length: int) -> str:
    answers = [record.correct for record in records if record.length == length]
    return f"{format_length(length)}\n{f'{sum(answers)}/{len(answers)}' if answers else 'not asked'}"
