"""Tables: what stands in their cells."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from drt.errors import DRTError
from drt.eval.results import AnswerRecord, NeedleRecord, TrainingRecord
from drt.report.models import group_seeds
from drt.report.tables import (
    answer_table,
    difference_table,
    format_count,
    needle_table,
    perplexity_table,
    seeds_table,
    training_table,
)

from .conftest import MakePerplexity


def test_seeds_are_one_model(perplexity: MakePerplexity) -> None:
    names = [
        "runs/lm/drt-s0/final",
        "runs/lm/drt-s1/final",
        "drt_seed2",
        "window",
        "a/x/final",
        "b/x/final",
        "s3",
    ]
    records = [perplexity(name, 1.0)[0] for name in names]
    grouped = {name: [r.checkpoint for r in found] for name, found in group_seeds(records).items()}
    assert grouped == {
        "drt": names[:3],
        "window": ["window"],
        "a/x/final": ["a/x/final"],
        "b/x/final": ["b/x/final"],
        "s3": ["s3"],
    }


def test_perplexity_by_model_and_position(perplexity: MakePerplexity) -> None:
    models = {
        "drt": [*perplexity("drt-s0", 0.9), *perplexity("drt-s1", 1.1)],
        "window": perplexity("window", 1.2),
    }
    table = perplexity_table("books", models, [2048, 16384, 65536])
    assert table.columns[5:] == ("bits/byte", "0-2K", "2K-16K", "16K-")
    drt, window = table.rows
    assert drt[:4] == ("drt", "2", "2", "23K")
    assert window[:4] == ("window", "1", "2", "23K")
    assert drt[6] == f"**{1 / math.log(2):.4f}**"
    assert drt[7] == f"**{0.95 / math.log(2):.4f}**"
    assert window[8] == f"{1.2 * 0.9 / math.log(2):.4f}"
    nats = (1.2 * (2 * 2047 + 0.95 * (952 + 14336) + 0.9 * 3616)) / 22998
    assert window[4] == f"{math.exp(nats):.3f}"
    assert window[5] == f"{nats / math.log(2):.4f}"


def test_differences_are_to_the_best_or_to_the_reference(perplexity: MakePerplexity) -> None:
    models = {"window": perplexity("window", 1.2), "drt": perplexity("drt", 1.0)}
    table = difference_table("books", models)
    assert "minus those of drt" in table.title
    ((name, difference, interval, documents),) = table.rows
    assert (name, documents) == ("window", "2")
    assert 0.2 < float(difference) < 0.29
    low, high = (float(part) for part in interval.split(" to "))
    assert low <= float(difference) <= high
    ((name, mirrored, *_),) = difference_table("books", models, "window").rows
    assert name == "drt"
    assert float(mirrored) == -float(difference)


def test_models_of_other_documents_are_not_compared(perplexity: MakePerplexity) -> None:
    models = {"window": perplexity("window", 1.2)[:1], "drt": perplexity("drt", 1.0)}
    with pytest.raises(DRTError, match="same documents"):
        difference_table("books", models)


def test_each_seed_of_models_that_have_several(perplexity: MakePerplexity) -> None:
    models = {"drt": [*perplexity("drt-s0", 0.9), *perplexity("drt-s1", 1.1)], "w": perplexity("w", 1.2)}
    rows = seeds_table("books", models).rows
    assert [row[:2] for row in rows] == [("drt", "drt-s0"), ("drt", "drt-s1")]
    assert float(rows[0][2]) < float(rows[1][2])


def test_needles_with_the_papers_rows_below(needles: list[NeedleRecord]) -> None:
    table = needle_table("single", group_seeds(needles), {"paper": {16384: 97.9, 65536: 0.0}})
    assert table.columns == ("model", "1K", "16K", "64K")
    assert table.rows == (
        ("drt", "100.0 (4)", "100.0 (4)", "-"),
        ("window", "100.0 (4)", "0.0 (4)", "-"),
        ("paper", "-", "97.9", "0.0"),
    )


def test_trainings_and_answers(training: TrainingRecord, answers: list[AnswerRecord]) -> None:
    (row,) = training_table([training]).rows
    assert row == ("drt-s0", "drt", "3,012,345", "0", "2,500", "10.24M", "50.0", "cpu")
    table = answer_table("niah_multikey_2", {"drt": answers})
    assert table.columns == ("model", "length", "questions", "recall, %")
    assert table.rows == (("drt", "4K", "4", "50.00"),)
    two = [answers[0], replace(answers[0], length=16384)]
    assert [row[1] for row in answer_table("niah", {"drt": two}).rows] == ["4K", "16K"]


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (4096, "4.096K"), (12_345_678, "12.35M")])
def test_counts_in_short(number: int, text: str) -> None:
    assert format_count(number) == text
