"""Paired comparison: closed cases, coverage of the interval, seeds, what cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drt.errors import DRTError
from drt.eval.compare import compare_bits_per_byte
from drt.eval.results import PerplexityRecord


def records(losses: list[float], size: int = 100, checkpoint: str = "a") -> list[PerplexityRecord]:
    """One document a loss (in bits), each of `size` bytes."""
    return [
        PerplexityRecord(
            task="perplexity",
            checkpoint=checkpoint,
            device="cpu",
            dtype="float32",
            data="corpus",
            document=f"d{index}",
            index=index,
            length=size + 1,
            positions=[size + 1],
            tokens=[size],
            bytes=[size],
            losses=[loss * math.log(2)],
            seconds=1.0,
            peak_rss_bytes=1,
            peak_device_bytes=None,
            batch_size=1,
        )
        for index, loss in enumerate(losses)
    ]


def test_what_differs_alike_everywhere_has_no_spread() -> None:
    """Documents may be hard or easy: only the pairs count."""
    hard_and_easy = [100.0, 900, 300, 500]
    found = compare_bits_per_byte(records([loss - 20 for loss in hard_and_easy]), records(hard_and_easy))
    assert found.documents == 4
    assert found[:3] == pytest.approx((-0.2, -0.2, -0.2))


def test_the_difference_is_over_all_bytes_and_a_seed_repeats_it() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(100, 20, size=(2, 12))
    first, second = (records(list(row)) for row in losses)
    found = compare_bits_per_byte(first, second, seed=3)
    assert found.difference == pytest.approx((losses[0] - losses[1]).sum() / 1200)
    assert found.low < found.difference < found.high
    assert compare_bits_per_byte(first, second, seed=3) == found
    assert compare_bits_per_byte(first, second, seed=4) != found
    mirrored = compare_bits_per_byte(second, first, seed=3)
    assert mirrored[:3] == pytest.approx((-found.difference, -found.high, -found.low))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        noise = rng.normal(5.0, 10.0, size=40)
        found = compare_bits_per_byte(
            records(list(noise)), records([0.0] * 40), resamples=400, confidence=0.8
        )
        held += found.low <= 0.05 <= found.high
    assert 0.72 <= held / 300 <= 0.86  # 0.8 +- 2.3% of counting, and a bootstrap of 40 is a little too narrow


def test_seeds_of_a_model_are_averaged_on_each_document() -> None:
    two = records([10.0, 30], checkpoint="s0") + records([20.0, 60], checkpoint="s1")
    mean = compare_bits_per_byte(two, records([5.0, 5]))
    assert mean == compare_bits_per_byte(records([15.0, 45]), records([5.0, 5]))


def test_other_documents_cannot_be_compared() -> None:
    message = r"same documents, got 2 and 3 documents; only one has d2 \(101 tokens\)"
    with pytest.raises(DRTError, match=message):
        compare_bits_per_byte(records([1.0, 2]), records([1.0, 2, 3]))
    with pytest.raises(DRTError, match="same documents"):
        compare_bits_per_byte(records([1.0]), records([1.0], size=50))
    with pytest.raises(DRTError, match="got 0 and 0 documents"):
        compare_bits_per_byte([], [])
    with pytest.raises(DRTError, match="each of 2 checkpoints, got another number of d1"):
        compare_bits_per_byte(records([1.0, 2]) + records([1.0], checkpoint="b"), records([1.0, 2]))
