"""The line figures: what is drawn, where, and under which names."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from drt.eval.results import NeedleRecord, PerplexityRecord
from drt.plotting.cost import plot_cost
from drt.plotting.needle import plot_needles
from drt.plotting.perplexity import plot_loss_by_position
from drt.plotting.style import COLOURS, format_position, line_style, save_figure, show_name

COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "peak_rss_bytes": 3 * 10**8,
    "batch_size": 1,
}


def document(checkpoint: str, bits: Sequence[float], positions: Sequence[int]) -> PerplexityRecord:
    """One document, of `bits[i]` bits a byte in bucket i."""
    tokens = [stop - start for start, stop in pairwise([1, *positions])]
    return PerplexityRecord(
        task="perplexity",
        checkpoint=checkpoint,
        data="books",
        document="d",
        index=0,
        length=positions[-1],
        positions=list(positions),
        tokens=tokens,
        bytes=tokens,
        losses=[value * math.log(2) * count for value, count in zip(bits, tokens, strict=True)],
        seconds=1.0,
        peak_device_bytes=None,
        **COMMON,
    )


NAMES = ("$$", "$\\frac$", "_private", "a\\", "\x1b[31m\n\ud800", "一", "x" * 5000, "[x](y)")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_any_name_can_be_drawn(kind: str) -> None:
    models = {name: [document(name, [3, 2], [256, 512])] for name in NAMES}
    found = {
        name: [replace(needle(name, n, 1.0, None), checkpoint=name) for n in (64, 128)] for name in NAMES
    }
    figures = [plot_loss_by_position(models, "$$"), plot_cost(found), plot_needles(found["$$"] + found["一"])]
    for figure in figures:
        save_figure(figure, io.BytesIO(), kind)
    for figure in figures[:2]:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [show_name(name) for name in NAMES]
    assert show_name("_private") == "_private"
    assert show_name("a$b") == r"a\$b"
    assert len(show_name("x" * 5000)) == 80


@pytest.mark.parametrize("size", [(6, 4), (1000, 3), (500, 500), (10**6, 10**6)])
def test_a_figure_of_any_size_can_be_written(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    dots: list[float] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format, dpi: dots.append(dpi))
    save_figure(Figure(figsize=size), io.BytesIO(), "png")
    height, width = (side * dots[0] for side in size)
    assert max(height, width) < 2**16
    assert height * width <= 2**24 + 1
    assert (dots == [150]) == (size == (6, 4))


def test_bits_per_byte_and_their_differences() -> None:
    models = {
        "window": [document("window", [3, 2, 2], [256, 512, 1024])],
        "drt": [document("drt", [3, 1.5, 1], [256, 512, 1024])],
    }
    absolute, difference = plot_loss_by_position(models, "window").axes
    for name, line, values in zip(models, absolute.lines, ([3, 2, 2], [3, 1.5, 1]), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), [256, 512, 1024])
        np.testing.assert_allclose(line.get_ydata(), values)
    np.testing.assert_allclose(difference.lines[0].get_ydata(), 0)
    np.testing.assert_allclose(difference.lines[1].get_ydata(), [0, -0.5, -1])
    assert "window" in difference.get_ylabel()
    (legend,) = absolute.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["window", "drt"]
    assert [text.get_text() for text in absolute.get_xticklabels()] == ["256", "512", "1K"]


def test_one_model_has_no_differences() -> None:
    assert len(plot_loss_by_position({"drt": [document("drt", [3, 2], [256, 300])]}).axes) == 1


def test_nothing_to_draw_is_refused() -> None:
    for function in (plot_loss_by_position, plot_cost):
        with pytest.raises(ValueError, match="at least one model to draw, got none"):
            function({})
    with pytest.raises(ValueError, match="expected a reference of drt, got 'x'"):
        plot_loss_by_position({"drt": [document("drt", [3], [256])]}, "x")


def needle(task: str, length: int, seconds: float, device_bytes: int | None) -> NeedleRecord:
    return NeedleRecord(
        task=task,
        checkpoint="drt",
        length=length,
        depth=0.5,
        index=0,
        seed=7,
        expected="1",
        generated="1",
        correct=True,
        tokens_per_second=length / seconds,
        prefill_seconds=seconds,
        decode_seconds_per_token=0.02,
        peak_device_bytes=device_bytes,
        haystack=[],
        settings={},
        **COMMON,
    )


def test_cost_takes_tasks_together_and_the_memory_of_the_device() -> None:
    records = [
        needle("single", 1024, 1.0, None),
        needle("multikey", 1024, 3.0, None),
        needle("single", 4096, 4.0, 10**9),
    ]
    reading, answering, memory = plot_cost({"drt": records}).axes
    for axes, values in ((reading, [512, 1024]), (answering, [20, 20]), (memory, [300, 1000])):
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1024, 4096])
        np.testing.assert_allclose(axes.lines[0].get_ydata(), values)


def test_styles_and_positions() -> None:
    styles = [tuple(line_style(number).values()) for number in range(2 * len(COLOURS))]
    assert len(set(styles)) == len(styles)
    assert [format_position(n) for n in (512, 1024, 1536, 2**20, 3 * 2**19)] == [
        "512",
        "1K",
        "1.5K",
        "1M",
        "1.5M",
    ]
