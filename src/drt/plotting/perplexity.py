"""Perplexity records as a picture: how well tokens are predicted, by their position in the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drt.eval.perplexity import Score, score_by_position
from drt.eval.results import PerplexityRecord
from drt.plotting.style import legend_below, length_axis, line_style, show_name, tidy

WIDTH, HEIGHT = 10.0, 4.4
Curve = dict[tuple[int, int | None], Score]


def plot_loss_by_position(
    models: Mapping[str, Sequence[PerplexityRecord]], reference: str | None = None
) -> Figure:
    """Bits per byte by position, on the left as they are, on the right minus those of a reference model.

    Deep positions exist in the long documents only, which may be easier or harder than the short ones: a curve on the
    left mixes depth and documents, the differences on the right are between models on the same tokens.

    Args:
        models: name -> its records; several checkpoints of a model (seeds) are taken together.
        reference: name of the model that the others are compared with. None: the first.

    Returns:
        A figure of its own, with no global state; `style.save_figure` writes it.

    Raises:
        ValueError: no records, or a reference that is none of the models.
    """
    if not models or not all(models.values()):
        raise ValueError("expected perplexity records of at least one model to draw, got none")
    reference = next(iter(models)) if reference is None else reference
    if reference not in models:
        raise ValueError(f"expected a reference of {', '.join(models)}, got {reference!r}")
    curves = {name: score_by_position(records) for name, records in models.items()}
    panels = 1 if len(curves) == 1 else 2
    width = WIDTH * (panels + 0.3) / 2.3
    figure = Figure(figsize=(width, HEIGHT + 0.22 * (len(curves) // 4)), layout="constrained")
    grid = figure.subplots(1, panels, squeeze=False)[0]
    _draw(grid[0], curves, {})
    grid[0].set_ylabel("bits per byte", fontsize=10)
    if panels == 2:
        _draw(grid[1], curves, curves[reference])
        grid[1].set_ylabel(f"bits per byte, minus those of {show_name(reference)}", fontsize=10)
    legend_below(figure, grid[0], width)
    return figure


def _draw(axes: Axes, curves: Mapping[str, Curve], baseline: Curve) -> None:
    """One line a model, with a mark at the end of each bucket; minus `baseline` where that is not empty."""
    drawn: list[float] = []
    for number, (name, curve) in enumerate(curves.items()):
        shared = {bucket: score for bucket, score in curve.items() if not baseline or bucket in baseline}
        ends = [float(end or 0) for _, end in shared]
        values = [
            score.bits_per_byte - (baseline[bucket].bits_per_byte if baseline else 0)
            for bucket, score in shared.items()
        ]
        axes.plot(ends, values, label=show_name(name), markersize=4, linewidth=1.4, **line_style(number))
        drawn += ends
    length_axis(axes, drawn)
    axes.set_xlabel("position in the document, up to", fontsize=10)
    tidy(axes)
