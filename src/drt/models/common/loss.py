"""The training loss of a language-modelling head, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drt.ops.linear_cross_entropy import linear_cross_entropy


def needs_no_logits(
    module: nn.Module,
    head: nn.Module,
    labels: Tensor | None,
    logits_to_keep: Any,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> bool:
    """Whether a training step wants the loss alone, of a head that nothing (an adapter, say) has wrapped.

    Labels that are shifted already are left to the library's loss; its other arguments `causal_loss` takes.
    """
    training = module.training and torch.is_grad_enabled()
    whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
    # Nor of one whose weight comes for the time of its call only, as accelerate's offloading has it.
    plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook") and shift_labels is None
    return labels is not None and training and whole and plain


def causal_loss(
    head: nn.Linear,
    states: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """What the library's causal loss gives for the head's logits, 0-d float32.

    Args:
        head: without bias.
        states: (B, L, H), aligned with ``labels``.
        labels: (B, L) token ids, shifted here; ``ignore_index`` where nothing is scored.
        num_items_in_batch: divides the sum instead of the count of scored tokens: of a batch in several parts.
        ignore_index: the label that does not count.
        kwargs: what else the library's loss takes and does not need.
    """
    targets = pad(labels, (0, 1), value=ignore_index)[:, 1:].flatten()
    divisor = num_items_in_batch
    if divisor is not None:
        divisor = torch.as_tensor(divisor, device=states.device)
    return linear_cross_entropy(
        states.flatten(0, 1), head.weight, targets, ignore_index=ignore_index, divisor=divisor
    )
