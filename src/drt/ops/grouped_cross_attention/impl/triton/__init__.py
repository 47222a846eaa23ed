# mypy: disable-error-code="import-untyped,import-not-found"
"""Triton kernels: chunks are read through their indices, and nothing is gathered.

CUDA tensors in float32, float16 or bfloat16, D up to 256. With TRITON_INTERPRET=1 in the environment before Triton is
imported, the kernels run on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from drt.ops.device_guard import on_its_device
from drt.ops.grouped_cross_attention.impl.triton.backward import backward
from drt.ops.grouped_cross_attention.impl.triton.decode import decode
from drt.ops.grouped_cross_attention.impl.triton.forward import forward
from drt.ops.grouped_cross_attention.impl.triton.problem import prepare

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256
# Fewer programs than this would leave multiprocessors idle, so the slots are split over programs too.
DECODE_PROGRAMS = 128

FORWARD = "drt::grouped_cross_attention_triton"
BACKWARD = "drt::grouped_cross_attention_triton_backward"
ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor values, Tensor? indices, Tensor weights, Tensor? lengths, "
    "int block_size, float scale, bool sink"
)


def supports(query: Tensor) -> bool:
    """Whether the kernels take such queries, for the choice that `impl=None` makes."""
    return query.dtype in DTYPES and query.shape[-1] <= MAX_DIM


def grouped_cross_attention(
    query: Tensor,
    chunk_keys: Tensor,
    chunk_values: Tensor,
    chunk_indices: Tensor,
    chunk_weights: Tensor,
    chunk_lengths: Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> Tensor:
    """Attend to chunks by index."""
    _check(query)
    if chunk_keys.shape[1] == 0:
        return torch.zeros_like(query)
    output, _ = torch.ops.drt.grouped_cross_attention_triton(
        query, chunk_keys, chunk_values, chunk_indices, chunk_weights, chunk_lengths, block_size, scale, sink
    )
    return output


def attend_gathered_chunks(
    query: Tensor,
    gathered_keys: Tensor,
    gathered_values: Tensor,
    chunk_weights: Tensor,
    gathered_lengths: Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> Tensor:
    """Attend to gathered chunks, in whatever layout they lie."""
    _check(query)
    output, _ = torch.ops.drt.grouped_cross_attention_triton(
        query, gathered_keys, gathered_values, None, chunk_weights, gathered_lengths, block_size, scale, sink
    )
    return output


def _check(query: Tensor) -> None:
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"impl 'triton' needs CUDA tensors; got tensors on {query.device}")
    if query.dtype not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"impl 'triton' computes in {wanted}; got {query.dtype}")
    if query.shape[-1] > MAX_DIM:
        raise ValueError(f"impl 'triton' takes head dimensions up to {MAX_DIM}; got {query.shape[-1]}")


@on_its_device
def _forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = prepare(query, *rest)
    if problem.blocks == 0:
        return torch.empty_like(problem.query), problem.per_row()
    if problem.blocks * problem.kv_heads < DECODE_PROGRAMS:
        return decode(problem)
    return forward(problem)


@on_its_device
def _backward(
    grad_output: Tensor, log_sums: Tensor, query: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = prepare(query, keys, values, *rest)
    weights = rest[1]
    if problem.blocks == 0:
        grad_keys, grad_values = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (keys, values)
        )
        return torch.empty_like(problem.query), grad_keys, grad_values, torch.zeros_like(weights)
    grad_query, grad_keys, grad_values, grad_weights = backward(problem, log_sums, grad_output)
    return grad_query, grad_keys, grad_values, grad_weights.to(weights.dtype)


def _fake_forward(query: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, weights, _, block_size, _, _ = rest
    batch, blocks, slots = weights.shape
    kv_heads = keys.shape[-2]
    rows = block_size * query.shape[2] // kv_heads
    log_sums = query.new_empty(batch * blocks, kv_heads, slots, rows, dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sums


def _fake_backward(
    grad_output: Tensor, log_sums: Tensor, query: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = rest[1]
    return (
        query.new_empty(query.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        weights.new_empty(weights.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale, ctx.sink = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.drt.grouped_cross_attention_triton_backward(
        grad_output, *ctx.saved_tensors, ctx.block_size, ctx.scale, ctx.sink
    )
    grad_query, grad_keys, grad_values, grad_weights = grads
    return grad_query, grad_keys, grad_values, None, grad_weights, None, None, None, None


torch.library.define(FORWARD, f"({ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD, f"(Tensor grad_output, Tensor log_sums, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.impl(FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(BACKWARD, "CompositeExplicitAutograd", _backward)
torch.library.register_fake(FORWARD, _fake_forward)
torch.library.register_fake(BACKWARD, _fake_backward)
torch.library.register_autograd(FORWARD, _autograd, setup_context=_setup_context)
