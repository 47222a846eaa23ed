"""The length x depth picture: the numbers that it shows, and what is drawn where."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from drt.eval.results import NeedleRecord
from drt.plotting.needle import accuracy_grid, plot_needles


def make_record(correct: bool, index: int = 0, samples: int = 4, **changes: Any) -> NeedleRecord:
    values = {
        "task": "single",
        "length": 1024,
        "depth": (index + 0.5) / samples,
        "index": index,
        "seed": 7,
        "expected": "12345",
        "generated": "12345",
        "correct": correct,
        "tokens_per_second": 1.0,
        "prefill_seconds": 1.0,
        "decode_seconds_per_token": 1.0,
        "peak_rss_bytes": 1,
        "peak_device_bytes": None,
        "batch_size": 1,
        "checkpoint": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "haystack": [],
        "settings": {},
    }
    return NeedleRecord(**values | changes)


def texts(figure: Figure) -> list[list[str]]:
    """The numbers in the cells of each panel."""
    return [[text.get_text() for text in axes.texts] for axes in figure.axes[:-1]]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes[:-1]]


def test_accuracy_by_length_and_depth() -> None:
    records = [
        make_record(True, depth=0.0),
        make_record(False, depth=0.49),
        make_record(True, depth=0.5),
        make_record(True, depth=1.0),
        make_record(False, depth=1.0, length=64),
    ]
    grid = accuracy_grid(records, [64, 1024], 2)
    np.testing.assert_array_equal(grid, [[np.nan, 50.0], [0.0, 100.0]])


def test_cells_and_labels() -> None:
    found = {64: [True, True, False, True], 65536: [False, True, False, False]}
    records = [
        make_record(correct, index, length=length)
        for length, answers in found.items()
        for index, correct in enumerate(answers)
    ]
    figure = plot_needles(records[::-1])
    (cells,) = texts(figure)
    assert cells == [
        "100",
        "0",
        "100",
        "100",
        "0",
        "0",
        "100",
        "0",
    ]  # row by row, the start of the text first
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64\n3/4", "64K\n1/4"]
    low, high = axes.get_ylim()
    assert (low, high) == (1, 0)  # the start of the text on top
    assert figure.get_suptitle() == "Needles found by tiny"


def test_one_panel_a_task_and_a_row_of_them_a_checkpoint() -> None:
    records = [
        make_record(correct, index, task=task, checkpoint=checkpoint)
        for checkpoint, task, correct in [
            ("a", "single", True),
            ("a", "multihop", False),
            ("b", "single", False),
        ]
        for index in range(4)
    ]
    figure = plot_needles(records)
    assert titles(figure) == ["a: single", "a: multihop", "b: single", "b: multihop"]
    assert texts(figure) == [["100"] * 4, ["0"] * 4, ["0"] * 4, []]
    assert figure.axes[3].get_xticklabels()[0].get_text() == "1K\nnot asked"
    positions = [axes.get_position() for axes in figure.axes[:4]]
    assert positions[0].y0 > positions[2].y0
    assert positions[0].x0 < positions[1].x0


@pytest.mark.parametrize(("samples", "bins"), [(1, 1), (3, 3), (10, 10), (25, 10)])
def test_there_are_as_many_depths_as_samples_up_to_ten(samples: int, bins: int) -> None:
    records = [make_record(True, index, samples) for index in range(samples)]
    records += [make_record(True, index, 40, length=64) for index in range(40)]
    assert texts(plot_needles(records)) == [["100"] * 2 * bins]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_figure_can_be_saved(suffix: str) -> None:
    file = io.BytesIO()
    plot_needles([make_record(True, index) for index in range(4)]).savefig(file, format=suffix)
    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert file.getvalue().startswith(begin)


def test_no_state_is_left_behind() -> None:
    before = pyplot.get_fignums()
    plot_needles([make_record(True)])
    assert pyplot.get_fignums() == before


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="at least one needle record"):
        plot_needles([])
