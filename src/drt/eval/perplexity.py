"""Perplexity of whole documents: every token is predicted from all that stands before it in its document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.eval.documents import ByteCounter, Document, TokenIds
from drt.eval.results import PerplexityRecord
from drt.machine import clock, peak_rss_bytes
from drt.models.common.devices import input_device

TASK = "perplexity"
POSITIONS = tuple(2**n for n in range(8, 25))  # ends of the buckets that a record keeps: 256, 512, ..., 16M
COLUMNS = (
    2**11,
    2**14,
    2**16,
    2**18,
)  # ends of the buckets that tables show; one more holds what lies beyond


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    checkpoint: str,
    data: str,
    positions: Sequence[int] = COLUMNS,
    segment_size: int = 4096,
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[PerplexityRecord]:
    """Read documents from their first token to their last and yield a record of each, longest first.

    The model reads a document in segments, through its cache: a chunk memory streams along, a model without one
    streams what it keeps. The loss is that of reading in one pass.

    Args:
        model: a causal language model with a cache, in eval mode, on any device.
        tokenizer: the model's.
        documents: what is read.
        checkpoint: name of the model, for the records.
        data: name of the data, for the records.
        positions: ends of position buckets, beside the powers of two that are always kept.
        segment_size: tokens of one forward pass, all rows of a batch together; bounds the memory of a pass.
        batch_size: documents read side by side; those of a batch are of similar length.
        on_progress: called with the number of tokens just read.

    Raises:
        ValueError: segment_size or batch_size < 1, a position < 1, or a model in training mode.
    """
    if segment_size < 1 or batch_size < 1 or min(positions, default=1) < 1:
        raise ValueError(
            f"segment_size, batch_size and positions must be >= 1, got {segment_size}, {batch_size}, {positions}"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    ends = sorted({*POSITIONS, *positions})
    counter = ByteCounter(tokenizer)
    ordered = sorted(documents, key=lambda document: (-len(document.tokens), document.index))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        start = clock(model.device)
        rows = token_losses(
            model, [d.tokens for d in batch], max(1, segment_size // len(batch)), on_progress=on_progress
        )
        seconds = clock(model.device) - start
        total = sum(len(document.tokens) for document in batch)
        for document, losses in zip(batch, rows, strict=True):
            yield PerplexityRecord(
                task=TASK,
                checkpoint=checkpoint,
                device=str(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                data=data,
                document=document.name,
                index=document.index,
                length=len(document.tokens),
                **_buckets(document.tokens, losses, ends, counter)._asdict(),
                seconds=seconds * len(document.tokens) / total,
                peak_rss_bytes=peak_rss_bytes(),
                peak_device_bytes=_peak_device_bytes(model.device),
                batch_size=len(batch),
            )


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    rows: Sequence[TokenIds],
    segment_size: int,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[NDArray[np.float32]]:
    """Negative log-likelihood of every token but the first, given all tokens before it.

    Args:
        model: in eval mode.
        rows: token ids of texts that are read side by side, (T_b,) each, T_b >= 2.
        segment_size: tokens of each row in one forward pass, >= 1.
        on_progress: called with the number of tokens just read; they add up to the sum of T_b.

    Returns:
        (T_b - 1,) for each row, in nats, float32: entry t is the loss of token t + 1.
    """
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), np.int32)  # causality makes what follows a shorter row harmless
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    losses = np.empty((len(rows), ids.shape[1] - 1), np.float32)
    cache, counted = None, 0
    for read in range(0, losses.shape[1], segment_size):
        stop = min(read + segment_size, losses.shape[1])
        window = torch.from_numpy(ids[:, read : stop + 1]).to(input_device(model)).long()
        output = model(input_ids=window[:, :-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits.float().flatten(0, 1)
        losses[:, read:stop] = (
            cross_entropy(logits, window[:, 1:].flatten(), reduction="none").view(len(rows), -1).cpu().numpy()
        )
        if on_progress is not None:
            seen = sum(min(length, stop + 1) for length in lengths)
            on_progress(seen - counted)
            counted = seen
    return [row[: length - 1] for row, length in zip(losses, lengths, strict=True)]


def _peak_device_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class _Buckets(NamedTuple):
    """Fields of a record."""

    positions: list[int]
    tokens: list[int]
    bytes: list[int]
    losses: list[float]


def _buckets(
    tokens: TokenIds, losses: NDArray[np.float32], ends: Sequence[int], counter: ByteCounter
) -> _Buckets:
    """Sums by position; `losses[t]` is of the token at position t + 1."""
    length = len(tokens)
    inner = [end for end in ends if end < length]
    positions = [*inner, next((end for end in ends if end >= length), length)]
    cuts = [1, *(max(end, 1) for end in inner), length]
    return _Buckets(
        positions=positions,
        tokens=[int(n) for n in np.diff(cuts)],
        bytes=counter.count_between(tokens, cuts),
        losses=[float(losses[start - 1 : end - 1].sum(dtype=np.float64)) for start, end in pairwise(cuts)],
    )


@dataclass(frozen=True)
class Score:
    """How well some tokens were predicted.

    Attributes:
        tokens: how many.
        bytes: of UTF-8 that they stand for.
        loss: sum of their negative log-likelihoods, in nats.
    """

    tokens: int
    bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        try:
            return math.exp(self.loss / self.tokens)
        except OverflowError:  # more than 709 nats a token
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that an ideal compressor would spend on a byte of the text; comparable between tokenizers."""
        return self.loss / math.log(2) / self.bytes if self.bytes else math.nan


def total_score(records: Sequence[PerplexityRecord]) -> Score:
    """All tokens of all documents."""
    return Score(
        sum(sum(record.tokens) for record in records),
        sum(sum(record.bytes) for record in records),
        sum(sum(record.losses) for record in records),
    )


def score_by_position(
    records: Sequence[PerplexityRecord], ends: Sequence[int] | None = None
) -> dict[tuple[int, int | None], Score]:
    """Scores of position buckets over all documents.

    Args:
        records: of documents; at deep positions only the long ones count.
        ends: where buckets end, ascending; the records must have buckets that end there. Default: wherever a bucket
            of all records that reach so far ends.

    Returns:
        (start, end) -> score for each bucket that holds text; the end of the one beyond the last of `ends` is None.

    Raises:
        DRTError: a record has no bucket that ends at one of `ends`.
    """
    if ends is None:
        found = sorted({end for record in records for end in record.positions})
        ends = [end for end in found if all(end in r.positions for r in records if r.length > end)]
    bounds = [0, *ends, None]
    sums = np.zeros((len(ends) + 1, 3))
    for record in records:
        reached = [end for end in ends if end < record.length]
        if missing := set(reached) - set(record.positions):
            kept = ", ".join(map(str, record.positions))
            raise DRTError(
                f"lengths: the records of {record.checkpoint} were made without {min(missing)}; "
                f"they can be shown at {kept}"
            )
        place = np.searchsorted(ends, record.positions, side="left")
        place[-1] = len(reached)  # the last bucket ends with the document
        np.add.at(sums, place, np.stack([record.tokens, record.bytes, record.losses], 1))
    return {
        (bounds[i] or 0, bounds[i + 1]): Score(int(tokens), int(size), float(loss))
        for i, (tokens, size, loss) in enumerate(sums)
        if size  # an end token alone stands for no byte
    }
