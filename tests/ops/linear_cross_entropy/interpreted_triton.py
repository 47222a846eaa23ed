"""The kernel of the loss in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of its own.

The interpreter's bfloat16 rounds otherwise than torch, so float16 stands for it here.
"""

from __future__ import annotations

import pytest
import torch

from drt.ops.linear_cross_entropy.impl import eager, triton
from drt.testing.tolerance import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "columns"), [(1, 1), (7, 16), (50, 50), (50, 64), (64, 64)])
def test_loss_and_gradient(
    vocabulary: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "COLUMNS", 16)
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(9, columns, generator=generator, dtype=torch.float64)
    logits[:, vocabulary:] = torch.nan  # never read
    targets = torch.randint(0, vocabulary, (9,), generator=generator)
    counts = torch.arange(9) % 3 != 0
    logits = logits.to(dtype)
    actual, plain, exact = (
        function(x, targets, counts, vocabulary, True)
        for function, x in (
            (triton.loss_and_gradient, logits.clone()),
            (eager.loss_and_gradient, logits.clone()),
            (eager.loss_and_gradient, logits.double()),
        )
    )
    for name, *results in zip(("loss", "gradient"), actual, plain, exact, strict=True):
        assert_as_accurate(name, *results)
    assert not actual[1][~counts].any()
    assert actual[1].shape == (9, columns)
    assert not actual[1][:, vocabulary:].any()


def test_a_loss_alone_leaves_the_logits() -> None:
    logits = torch.randn(5, 30)
    before = logits.clone()
    loss, grad = triton.loss_and_gradient(logits, torch.arange(5), torch.ones(5).bool(), 30, False)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="sum")
    )
    assert torch.equal(logits, before)
    assert len(grad) == 0


@pytest.mark.parametrize("wrong", [30, 32, -1, -(2**40), 2**40])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan(wrong: int, wanted: bool) -> None:
    """Nothing is read for it, which at such distances would be no memory of ours; a row that does not count may."""
    logits, targets, counts = (
        torch.randn(3, 32),
        torch.tensor([1, wrong, 2]),
        torch.tensor([True, True, True]),
    )
    assert triton.loss_and_gradient(logits.clone(), targets, counts, 30, wanted)[0].isnan()
    counts[1] = False
    expected = torch.nn.functional.cross_entropy(logits[::2, :30], targets[::2], reduction="sum")
    torch.testing.assert_close(triton.loss_and_gradient(logits, targets, counts, 30, wanted)[0], expected)
