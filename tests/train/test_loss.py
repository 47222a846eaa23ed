"""The loss of a needle batch against a slow, plain computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from drt.train.loss import TOTALS, needle_loss

TEXT_WEIGHT = 0.3


def _case(answers: list[tuple[int, int, int, bool]], text: list[tuple[int, int]]):
    """Masks of `answers` (row, first, past, is_chain) and `text` (row, position) over (3, 12) tokens."""
    input_ids = torch.randint(0, 7, (3, 12), generator=torch.Generator().manual_seed(0))
    answer_mask = torch.zeros(3, 12, dtype=torch.bool)
    chain_mask = torch.zeros(3, 12, dtype=torch.bool)
    text_mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, first, past, is_chain in answers:
        answer_mask[row, first:past] = True
        chain_mask[row, first:past] = is_chain
    for row, position in text:
        text_mask[row, position] = True
    scored = (answer_mask | text_mask).flatten().nonzero().flatten()
    return input_ids, scored, answer_mask, chain_mask, text_mask


# One answer ends with row 0 and the next begins early in row 1; text follows answers directly.
ANSWERS = [(0, 3, 6, False), (0, 9, 12, True), (1, 1, 3, True), (2, 4, 6, False), (2, 7, 9, False)]
TEXT = [(0, 1), (0, 6), (2, 6), (2, 11)]


def test_loss_is_the_weighted_mean_of_two_means() -> None:
    input_ids, scored, answer_mask, chain_mask, text_mask = _case(ANSWERS, TEXT)
    logits = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, totals = needle_loss(logits, input_ids, scored, scored - 1, answer_mask, chain_mask, TEXT_WEIGHT)

    def mean(mask):
        pairs = [(b, t) for b in range(3) for t in range(1, 12) if mask[b, t]]
        return torch.stack(
            [functional.cross_entropy(logits[b, t - 1], input_ids[b, t]) for b, t in pairs]
        ).mean()

    expected = mean(answer_mask) + TEXT_WEIGHT * mean(text_mask)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert not totals.requires_grad
    named = dict(zip(TOTALS, totals.tolist(), strict=True))
    assert named["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert named["answer_loss"] == pytest.approx(mean(answer_mask).item(), rel=1e-6)
    assert named["text_loss"] == pytest.approx(mean(text_mask).item(), rel=1e-6)


def test_totals_count_tokens_answers_and_chains() -> None:
    input_ids, scored, answer_mask, chain_mask, _ = _case(ANSWERS, TEXT)
    logits = torch.zeros(3, 12, 7)
    logits[:, :-1].scatter_(2, input_ids[:, 1:, None], 5.0)  # every token right ...
    logits[0, 4] = logits[0, 4].roll(1)  # ... but one of the first answer
    logits[1, 1] = logits[1, 1].roll(1)  # and one of the chain in row 1
    logits[2, 5] = logits[2, 5].roll(1)  # and a text token, which is not counted
    totals = needle_loss(logits, input_ids, scored, scored - 1, answer_mask, chain_mask, TEXT_WEIGHT).totals
    named = dict(zip(TOTALS, totals.tolist(), strict=True))
    assert named["steps"] == 1
    assert (named["answer_tokens"], named["answer_tokens_right"]) == (12, 10)
    assert (named["answers"], named["answers_right"]) == (5, 3)
    assert (named["chains"], named["chains_right"]) == (2, 1)


def test_a_batch_without_answers_has_the_text_loss_alone() -> None:
    input_ids, scored, answer_mask, chain_mask, _ = _case([], TEXT)
    logits = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(1))
    named = dict(
        zip(
            TOTALS,
            needle_loss(
                logits, input_ids, scored, scored - 1, answer_mask, chain_mask, TEXT_WEIGHT
            ).totals.tolist(),
            strict=True,
        )
    )
    assert named["answer_loss"] == 0
    assert named["answers"] == 0
    torch.testing.assert_close(named["loss"], TEXT_WEIGHT * named["text_loss"])
