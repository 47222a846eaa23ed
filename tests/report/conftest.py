"""Records of two models with two seeds each, and of needles."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from drt.eval.results import AnswerRecord, NeedleRecord, PerplexityRecord, TrainingRecord

COMMON = {"device": "cpu", "dtype": "float32"}
MakePerplexity = Callable[..., list[PerplexityRecord]]


@pytest.fixture
def perplexity() -> MakePerplexity:
    """`perplexity(checkpoint, nats)`: two documents of 3,000 and 20,000 bytes with so many nats a byte."""

    def make(checkpoint: str, nats: float, data: str = "books test") -> list[PerplexityRecord]:
        records = []
        for index, length in enumerate((3000, 20000)):
            positions = [p for p in (2048, 16384) if p < length] + [65536]
            cuts = [1, *positions[:-1], length]
            tokens = [stop - start for start, stop in pairwise(cuts)]
            records.append(
                PerplexityRecord(
                    task="perplexity",
                    checkpoint=checkpoint,
                    data=data,
                    document=f"d{index}",
                    index=index,
                    length=length,
                    positions=positions,
                    tokens=tokens,
                    bytes=tokens,
                    losses=[nats * n * (1 - 0.05 * i) for i, n in enumerate(tokens)],
                    seconds=1.0,
                    peak_rss_bytes=10**9,
                    peak_device_bytes=None,
                    batch_size=1,
                    **COMMON,
                )
            )
        return records

    return make


@pytest.fixture
def needles() -> list[NeedleRecord]:
    """`window` finds the needle at 1K only, `drt` everywhere; four depths."""
    return [
        NeedleRecord(
            task="single",
            checkpoint=checkpoint,
            length=length,
            depth=(index + 0.5) / 4,
            index=index,
            seed=7,
            expected="12345",
            generated="12345",
            correct=checkpoint == "drt" or length == 1024,
            tokens_per_second=1e4,
            prefill_seconds=length / 1e4,
            decode_seconds_per_token=0.01,
            peak_rss_bytes=5 * 10**8,
            peak_device_bytes=None,
            batch_size=1,
            haystack=["sample"],
            settings={},
            **COMMON,
        )
        for checkpoint in ("drt", "window")
        for length in (1024, 16384)
        for index in range(4)
    ]


@pytest.fixture
def training() -> TrainingRecord:
    return TrainingRecord(
        task="training",
        checkpoint="drt-s0",
        architecture="drt",
        parameters=3_012_345,
        seed=0,
        steps=2500,
        training_tokens=10_240_000,
        seconds=3000.0,
        **COMMON,
    )


@pytest.fixture
def answers() -> list[AnswerRecord]:
    return [
        AnswerRecord(
            task="niah_multikey_2",
            checkpoint="drt",
            data="RULER",
            index=index,
            length=4096,
            expected=["7"],
            generated="7",
            scores={"recall": float(index % 2)},
            **COMMON,
        )
        for index in range(4)
    ]
