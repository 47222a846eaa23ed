"""Loss and gradient of a block of logits in plain torch: any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_and_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, vocabulary: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss of the rows that count, and its gradient.

    Args:
        logits: (n, columns), columns >= vocabulary; those beyond the vocabulary are padding.
        targets: (n,) in [0, vocabulary).
        counts: (n,) bool.
        vocabulary: V.
        wanted: whether the gradient is; it is empty otherwise.

    Returns:
        0-d float32 (float64 for float64), and (n, columns) like the logits, whose memory it may take: 0 in padding.
    """
    exact = logits[:, :vocabulary].to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = exact.logsumexp(1, keepdim=True)
    target, skipped = targets[:, None], ~counts[:, None]
    loss = (log_sum - exact.gather(1, target)).masked_fill(skipped, 0).sum()
    if not wanted:
        return loss, logits[:0]
    grad = exact.sub_(log_sum).exp_()
    grad.scatter_add_(1, target, grad.new_full((), -1.0).expand(target.shape))
    grad.masked_fill_(skipped, 0)
    if vocabulary == logits.shape[1]:
        return loss, grad.to(logits.dtype)
    logits[:, :vocabulary] = grad
    logits[:, vocabulary:] = 0
    return loss, logits
