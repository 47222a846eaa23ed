"""RMSNorm in pieces against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drt.ops.rms_norm import PIECE, rms_norm

WIDTH = 24
EPS = 1e-3


def run(norm: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    """The output and both gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    output = norm(*leaves, EPS)
    return [output, *torch.autograd.grad(output.sin().sum(), leaves)]


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, PIECE // WIDTH // 2 + 7)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(*shape, WIDTH, dtype=torch.float64).to(dtype)
    weight = torch.randn(WIDTH, dtype=torch.float64).to(dtype)
    for ours, theirs in zip(run(rms_norm, x, weight), run(torch_norm, x, weight), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_any_memory_layout() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(WIDTH, 5, 2).permute(2, 1, 0), torch.randn(WIDTH)
    torch.testing.assert_close(run(rms_norm, x, weight), run(torch_norm, x, weight))


def test_gradients_are_finite_differences() -> None:
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_compiled() -> None:
    x, weight = torch.randn(3, WIDTH), torch.randn(WIDTH)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, weight), run(rms_norm, x, weight))
