"""RMSNorm on the CPU in one pass over memory, forward and backward; elsewhere torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of a piece: those of all its tensors stay in a core's cache from one operation to the next.
PIECE = 1 << 17


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension.

    torch makes this of seven operations on the CPU and its gradient of some fifteen, each a pass over memory. Here,
    for float32 and float64, rows are taken in pieces that stay in cache, and the gradient (which reaches both
    inputs, once) is written out: with x' = x / rms and g = weight * grad, it is (g - x' mean(g x')) / rms.

    Args:
        x: (..., H).
        weight: (H,).
        eps: added to the mean square.

    Returns:
        Like x.
    """
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and exact and not torch.compiler.is_compiling():
        output: Tensor = _RMSNorm.apply(x, weight, eps)
        return output
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output, scales = torch.empty_like(rows), rows.new_empty(len(rows), 1)
        for piece, out, scale in _pieces(rows, output, scales):
            torch.mul(piece, piece, out=out)
            torch.mean(out, -1, keepdim=True, out=scale).add_(eps).rsqrt_()
            torch.mul(piece, scale, out=out).mul_(weight)
        ctx.save_for_backward(rows, weight, scales)
        return output.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        grads = grad.reshape(rows.shape)
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        mean = weight / len(weight)
        for d, piece, scale, out in _pieces(grads, rows, scales, grad_rows):
            normed = piece * scale
            product = d * normed
            grad_weight += product.sum(0)
            torch.mul(d, weight, out=out)
            out.addcmul_(normed, (product @ mean).unsqueeze(1), value=-1).mul_(scale)
        return grad_rows.view(grad.shape), grad_weight, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, one piece after another; the first is (rows, H)."""
    step = max(1, PIECE // tensors[0].shape[1])
    return zip(*(x.split(step) for x in tensors), strict=True)
