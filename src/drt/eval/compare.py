"""Whether one model predicts better than another: paired bootstrap over the documents that both have read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drt.errors import DRTError
from drt.eval.results import PerplexityRecord

_AT_A_TIME = 1000  # resamples drawn together


class Difference(NamedTuple):
    """Bits per byte of one model minus those of another; negative: the first predicts better.

    Attributes:
        difference: over all bytes of the documents.
        low: lower end of the confidence interval.
        high: upper end.
        documents: how many were compared.
    """

    difference: float
    low: float
    high: float
    documents: int


def compare_bits_per_byte(
    first: Sequence[PerplexityRecord],
    second: Sequence[PerplexityRecord],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Compare two models, document by document.

    Documents are drawn with replacement, both models' losses of a document together, and the difference in bits per
    byte of each such draw is taken; the interval holds the middle `confidence` of them. So it says how much the
    result hangs on which documents were read. Several training seeds of a model are averaged on each document, and
    the interval does not cover how they vary.

    Args:
        first: records of one model, of one or of several checkpoints.
        second: records of another, of the same documents.
        seed: of the draws.
        resamples: number of draws.
        confidence: 0..1, share of the draws that the interval holds.

    Raises:
        DRTError: the two were not evaluated on the same documents, or on none.
    """
    mine, theirs = _mean_losses(first), _mean_losses(second)
    if mine.keys() != theirs.keys() or not mine:
        names = sorted(f"{key[1]} ({key[3]} tokens)" for key in mine.keys() ^ theirs.keys())
        raise DRTError(
            f"the models cannot be compared: expected records of the same documents, got {len(mine)} and "
            f"{len(theirs)} documents; only one has {', '.join(names[:3]) or 'any'}{', ...' if names[3:] else ''}"
        )
    pairs = np.array([(mine[key] - theirs[key], key[4]) for key in sorted(mine)])
    draws = _resample(pairs, np.random.default_rng(seed), resamples)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(_ratio(pairs.sum(0))), float(low), float(high), len(pairs))


_Key = tuple[str, str, int, int, int]  # data, document, index, tokens read, bytes


def _mean_losses(records: Sequence[PerplexityRecord]) -> dict[_Key, float]:
    """Loss of each document in nats, the mean over the checkpoints that read it."""
    losses: dict[_Key, list[float]] = {}
    for record in records:
        key = (record.data, record.document, record.index, record.length, sum(record.bytes))
        losses.setdefault(key, []).append(sum(record.losses))
    checkpoints = len({record.checkpoint for record in records})
    partly = [key[1] for key, found in losses.items() if len(found) != checkpoints]
    if partly:
        raise DRTError(
            f"expected one record of each document from each of {checkpoints} checkpoints, "
            f"got another number of {partly[0]}"
        )
    return {key: sum(found) / len(found) for key, found in losses.items()}


def _resample(pairs: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """(resamples,) differences in bits per byte; pairs: (D, 2) difference of losses and bytes of each document."""
    shares = np.full(len(pairs), 1 / len(pairs))
    counts = (
        rng.multinomial(len(pairs), shares, size=min(_AT_A_TIME, resamples - done))
        for done in range(0, resamples, _AT_A_TIME)
    )
    return np.concatenate([_ratio((drawn @ pairs).T) for drawn in counts])


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits per byte of (2, ...) sums of nats and of bytes."""
    nats, size = sums
    with np.errstate(divide="ignore", invalid="ignore"):  # documents of an end token alone have no byte
        return nats / math.log(2) / size
