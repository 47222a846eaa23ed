"""The loss of a needle batch, and what is counted beside it, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# What one step adds to the running totals, in the order of `NeedleLoss.totals`.
TOTALS = (
    "steps",
    "loss",
    "answer_loss",
    "text_loss",
    "answer_tokens",
    "answer_tokens_right",
    "answers",
    "answers_right",
    "chains",
    "chains_right",
)


class NeedleLoss(NamedTuple):
    """`loss` is a differentiable scalar; `totals` a (len(TOTALS),) float64 tensor without gradient."""

    loss: Tensor
    totals: Tensor


def needle_loss(
    logits: Tensor,
    input_ids: Tensor,
    scored: Tensor,
    predicted_by: Tensor,
    answer_mask: Tensor,
    chain_mask: Tensor,
    text_weight: float,
) -> NeedleLoss:
    """Mean cross-entropy over answer tokens + text_weight x mean over the sampled text tokens.

    Every shape is known beforehand, so nothing here makes the host wait for the device.

    Args:
        logits: (B, n, V), predictions of the next token at some positions of each row.
        input_ids: (B, L) int64.
        scored: (N,) int64, ascending: flat positions b * L + t of the tokens in the loss, none with t = 0.
        predicted_by: (N,) int64, the flat position b * n + i in `logits` of each scored token's prediction.
        answer_mask: (B, L) bool, the tokens of answers; every other scored token is text.
        chain_mask: (B, L) bool, the answer tokens of questions that ask for a chain.
        text_weight: weight of the text part.
    """
    targets = input_ids.flatten()[scored]
    predicted = logits.flatten(0, 1)[predicted_by].float()
    answer = answer_mask.flatten()[scored]
    chain = chain_mask.flatten()[scored]
    losses = functional.cross_entropy(predicted, targets, reduction="none")
    answer_loss = _masked_mean(losses, answer)
    text_loss = _masked_mean(losses, ~answer)
    loss = answer_loss + text_weight * text_loss

    right = predicted.detach().argmax(-1) == targets
    # An answer begins where the token before is not the scored answer token just before it.
    follows = torch.zeros_like(answer)
    follows[1:] = answer[1:] & answer[:-1] & (scored[1:] == scored[:-1] + 1)
    begins = answer & ~follows
    number = begins.long().cumsum(0) - 1
    wrong = torch.zeros(len(scored) + 1, dtype=torch.float32, device=scored.device)
    wrong.index_add_(0, number.clamp(min=0), (answer & ~right).float())
    whole = begins & (wrong[number.clamp(min=0)] == 0)
    counts = (answer, answer & right, begins, whole, begins & chain, whole & chain)
    totals = torch.stack(
        [torch.ones_like(loss), loss, answer_loss, text_loss, *(count.sum() for count in counts)]
    )
    return NeedleLoss(loss, totals.detach().double())


def needle_means(sums: dict[str, float]) -> dict[str, float]:
    """What is logged of the totals of several steps.

    Args:
        sums: by the names in `TOTALS`.
    """
    means = {name: sums[name] / sums["steps"] for name in ("loss", "answer_loss", "text_loss")}
    means["answer_accuracy"] = sums["answer_tokens_right"] / max(sums["answer_tokens"], 1.0)
    means["exact_match"] = sums["answers_right"] / max(sums["answers"], 1.0)
    if sums["chains"]:
        means["chain_exact_match"] = sums["chains_right"] / sums["chains"]
    return means


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked values; 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
