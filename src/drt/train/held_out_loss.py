"""Validation in training by the loss on rows that the model was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drt.train.trainer import Batch


class HeldOutLoss:
    """Callable (model) -> metrics: `loss` in nats a scored token, `perplexity`, and `score`, the negative loss.

    Args:
        rows: number of this process' rows.
        make_batch: (first, last) to `input_ids`, `labels` and what else the model takes, of the rows first..last - 1.
        rows_per_pass: rows that are read together.
        autocast: context of the forward pass.
        check_interrupt: called between two passes.

    Attributes:
        reduce: sums a tensor over processes; the trainer sets it.
    """

    def __init__(
        self,
        rows: int,
        make_batch: Callable[[int, int], Batch],
        rows_per_pass: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        check_interrupt: Callable[[], None],
    ) -> None:
        self.rows = rows
        self.make_batch = make_batch
        self.rows_per_pass = rows_per_pass
        self.autocast = autocast
        self.check_interrupt = check_interrupt
        self.reduce: Callable[[Tensor], Tensor] = lambda values: values

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """The mean loss of a model in eval mode."""
        device = next(model.parameters()).device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, self.rows, self.rows_per_pass):
            self.check_interrupt()
            made = self.make_batch(first, min(first + self.rows_per_pass, self.rows))
            batch = {name: tensor.to(device) for name, tensor in made.items()}
            with self.autocast():
                loss = model(**batch, use_cache=False, num_items_in_batch=1).loss  # a sum
            scored = (batch["labels"][:, 1:] >= 0).sum()
            totals += torch.stack([loss.double(), scored.double()])
        loss, scored = self.reduce(totals).tolist()
        mean = loss / scored
        return {"score": -mean, "loss": mean, "perplexity": math.exp(min(mean, 700.0))}
