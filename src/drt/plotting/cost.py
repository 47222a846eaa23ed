"""What reading costs, by the length of the text: speed, time of a generated token, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from drt.eval.results import NeedleRecord, Summary, summarise
from drt.plotting.style import legend_below, length_axis, line_style, show_name, tidy

PANELS: tuple[tuple[str, Callable[[Summary], float]], ...] = (
    ("reading, tokens/s", lambda row: row.tokens_per_second),
    ("ms a generated token", lambda row: 1e3 * row.decode_seconds_per_token),
    ("peak memory, MB", lambda row: (row.peak_device_bytes or row.peak_rss_bytes) / 1e6),
)


def plot_cost(models: Mapping[str, Sequence[NeedleRecord]]) -> Figure:
    """Reading speed, time of one step of generation and peak memory against the length of the text.

    Memory is the device's where there was one, else the process's. A model's tasks are drawn together: reading costs
    the same whatever is asked.

    Args:
        models: name -> its needle records.

    Returns:
        A figure of its own, with no global state; `style.save_figure` writes it.

    Raises:
        ValueError: no records.
    """
    if not models or not all(models.values()):
        raise ValueError("expected needle records of at least one model to draw, got none")
    rows = {name: _by_length(records) for name, records in models.items()}
    width = 10.5
    figure = Figure(figsize=(width, 3.7 + 0.22 * (len(rows) // 4)), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(axes, rows, value)
        axes.set_title(title, fontsize=10)
    legend_below(figure, figure.axes[0], width)
    return figure


def _by_length(records: Sequence[NeedleRecord]) -> list[Summary]:
    """One summary a length, tasks and checkpoints together."""
    return summarise([replace(record, task="", checkpoint="") for record in records])


def _draw(axes: Axes, rows: Mapping[str, list[Summary]], value: Callable[[Summary], float]) -> None:
    for number, (name, summaries) in enumerate(rows.items()):
        lengths = [row.length for row in summaries]
        values = [value(row) for row in summaries]
        axes.plot(lengths, values, label=show_name(name), markersize=4, linewidth=1.4, **line_style(number))
    length_axis(axes, [row.length for summaries in rows.values() for row in summaries])
    axes.set_xlabel("tokens of text", fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))
    tidy(axes)
