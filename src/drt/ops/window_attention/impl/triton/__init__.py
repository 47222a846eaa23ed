# mypy: disable-error-code="import-untyped,import-not-found"
"""Triton kernels for window attention: CUDA tensors in float32, float16 or bfloat16, D up to 256.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run on CPU tensors, slowly: that is
for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from drt.ops.device_guard import on_its_device
from drt.ops.window_attention.impl.triton.backward import backward
from drt.ops.window_attention.impl.triton.forward import forward
from drt.ops.window_attention.impl.triton.problem import prepare

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256

FORWARD = "drt::window_attention_triton"
BACKWARD = "drt::window_attention_triton_backward"
ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor values, Tensor? key_start, Tensor? slopes, int window, float scale"
)


def supports(query: Tensor) -> bool:
    """Whether the kernels take such queries, for the choice that `impl=None` makes."""
    return query.dtype in DTYPES and query.shape[-1] <= MAX_DIM


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    key_start: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as in `drt.ops.window_attention.window_attention`."""
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"impl 'triton' needs CUDA tensors; got tensors on {query.device}")
    if not supports(query):
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"impl 'triton' takes {wanted} and D up to {MAX_DIM}; got {query.dtype}, D={query.shape[-1]}"
        )
    output, _ = torch.ops.drt.window_attention_triton(
        query, key, value, key_start, alibi_slopes, window, scale
    )
    return output


@on_its_device
def _forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if query.numel() == 0:
        return _fake_forward(query)
    return forward(prepare(query, *rest))


@on_its_device
def _backward(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.numel() == 0:
        return query.new_zeros(query.shape), keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    return backward(prepare(query, keys, values, *rest), output, log_sums, grad_output)


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.drt.window_attention_triton_backward(
        grad_output, *ctx.saved_tensors, ctx.window, ctx.scale
    )
    return (*grads, None, None, None, None)


torch.library.define(FORWARD, f"({ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD, f"(Tensor grad_output, Tensor output, Tensor log_sums, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl(FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(BACKWARD, "CompositeExplicitAutograd", _backward)
torch.library.register_fake(FORWARD, _fake_forward)
torch.library.register_fake(BACKWARD, _fake_backward)
torch.library.register_autograd(FORWARD, _autograd, setup_context=_setup_context)
