"""Watch which chunks each group of a model retrieves while it generates, and with which weights."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from drt.eval.results import RetrievalRecord
from drt.models.drt import DRTForCausalLM


class Answer(NamedTuple):
    """A question, the text that continued it, and what was retrieved on the way."""

    question: str
    text: str
    records: list[RetrievalRecord]


class Selection(NamedTuple):
    """What a row's groups read after a chunk closed.

    Attributes:
        row: number of the row.
        columns: columns read since the trace began, left padding included.
        chunk_indices: (G, K) int64 on the CPU, -1 for an empty slot; the highest weight first.
        chunk_weights: (G, K) float32 on the CPU.
    """

    row: int
    columns: int
    chunk_indices: Tensor
    chunk_weights: Tensor


class RetrievalTrace:
    """Watches a model's passes; a context manager to put around `generate` (without beams: they reorder the rows).

    Of each pass the last chunk that a row closes is kept: its selection is what the tokens to come read. So one
    `generate` gives a selection for the end of each row's prompt and one for each chunk generated after it.

    Args:
        model: a model with chunk retrieval.

    Attributes:
        selections: what was seen, in the order in which it came.

    Raises:
        ValueError: a model without retrieval; within the context, a pass that uses no cache.
    """

    def __init__(self, model: DRTForCausalLM) -> None:
        if not model.config.retrieval:
            raise ValueError("wanted a model that retrieves chunks, got one with retrieval=False")
        self.model = model
        self.selections: list[Selection] = []
        self._columns = 0
        self._closed: Tensor | int = 0  # chunks that each row had closed before the pass
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RetrievalTrace:
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        closed = None if cache is None else cache.closed_counts
        self._closed = 0 if closed is None else closed
        given = next(
            tokens
            for tokens in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            if tokens is not None
        )
        self._columns += given.shape[1]
        return args, kwargs | {"output_retrieval": True}

    def _after(self, model: Any, args: Any, output: Any) -> None:
        cache = output.past_key_values
        if cache is None:
            raise ValueError("what is retrieved is traced through the cache: wanted use_cache=True")
        indices = torch.stack(output.chunk_indices, 1).cpu()  # (B, G, N, K)
        weights = torch.stack(output.chunk_weights, 1).detach().float().cpu()
        for row, new in enumerate((cache.closed_counts - self._closed).tolist()):
            if new:
                order = weights[row, :, new - 1].argsort(dim=-1, descending=True, stable=True)
                found = (tensor[row, :, new - 1].gather(1, order) for tensor in (indices, weights))
                self.selections.append(Selection(row, self._columns, *found))
