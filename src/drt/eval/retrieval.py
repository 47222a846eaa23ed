"""Watch which chunks each group of a model retrieves while it generates, and with which weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from drt.eval.results import RetrievalRecord
from drt.models.drt import DRTCache


class Answer(NamedTuple):
    """A question, the text that continued it, and what was retrieved on the way."""

    question: str
    text: str
    records: list[RetrievalRecord]


class Selection(NamedTuple):
    """What a row's groups read after a chunk closed.

    Attributes:
        row: number of the row.
        columns: columns of the sequence when it closed, left padding included.
        chunk_indices: (G, K) int64 on the CPU, -1 for an empty slot; the highest weight first.
        chunk_weights: (G, K) float32 on the CPU.
    """

    row: int
    columns: int
    chunk_indices: Tensor
    chunk_weights: Tensor


class RetrievalTrace(LogitsProcessor):
    """Notes what one `generate` retrieves, without beams: give it as ``logits_processor=[trace]``.

    Before each token is chosen it looks at the cache: where a row has closed a chunk since it last looked, what the row
    reads from now on is kept. So one `generate` gives a selection for the end of each row's prompt and one for each
    chunk generated after it. It changes no logits, and only its own cache is looked at: the model may serve other
    threads meanwhile.

    Args:
        cache: the ``past_key_values`` of that `generate`. Chunks that close after this object is made are noticed.

    Attributes:
        selections: what was seen, in the order in which it came.

    Raises:
        ValueError: within `generate`, for a model with ``retrieval=False``.
    """

    def __init__(self, cache: DRTCache) -> None:
        self.selections: list[Selection] = []
        self._cache = cache
        self._closed = cache.closed_counts  # chunks that each row had closed when it last looked

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look; returns ``scores`` as they are."""
        closed = self._cache.closed_counts
        assert closed is not None  # a pass has come before
        new = closed if self._closed is None else closed - self._closed
        self._closed = closed
        rows = new.nonzero().flatten().tolist()
        if rows:
            indices, weights = self._now_read()
            for row in rows:
                self.selections.append(Selection(row, input_ids.shape[1], indices[row], weights[row]))
        return scores

    def _now_read(self) -> tuple[Tensor, Tensor]:
        """Indices and weights (B, G, K) of what each row's groups read, the highest weight first."""
        held = [selection for selection in self._cache.selections if selection is not None]
        if not held:
            raise ValueError("expected a model that retrieves chunks, got one with retrieval=False")
        indices = torch.stack([selection.chunk_indices for selection in held], 1).cpu()
        weights = torch.stack([selection.chunk_weights for selection in held], 1).detach().float().cpu()
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return indices.gather(-1, order), weights.gather(-1, order)
