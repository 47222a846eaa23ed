"""The public functions: check the arguments, choose an implementation, call it."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch

from drt.ops.grouped_cross_attention import validation

IMPLEMENTATIONS = ("reference", "cpu", "triton")
HAS_TRITON = find_spec("triton") is not None


def grouped_cross_attention(
    query: torch.Tensor,
    chunk_keys: torch.Tensor,
    chunk_values: torch.Tensor,
    chunk_indices: torch.Tensor,
    chunk_weights: torch.Tensor,
    *,
    chunk_lengths: torch.Tensor | None = None,
    block_size: int,
    scale: float | None = None,
    sink: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Attend from blocks of queries to the chunks each block selected (arXiv 2410.01651, section 3.2).

    For query t of head j in a block that selected chunks i with weights w_i:

        a_i = exp(scale * q_t . K_i);  o_i = a_i V_i / (sum(a_i) + sink);  output_t = sum_i w_i o_i

    The gradient reaches query, chunk_keys, chunk_values and chunk_weights: the last one is what trains the
    retriever. Chunks are addressed by index and the gathered copy is never held whole.

    Args:
        query: (B, L, h, D), L a multiple of block_size.
        chunk_keys: (B, C, S, h_kv, D); h_kv divides h.
        chunk_values: (B, C, S, h_kv, D).
        chunk_indices: (B, L / block_size, K) integers in [0, C); -1 is an empty slot, which adds exactly 0.
            The same chunk may fill several slots. Indices outside [-1, C) are found here on the CPU; elsewhere
            looking would stall the device, and the result is undefined.
        chunk_weights: (B, L / block_size, K), any floating dtype; what an empty slot holds is ignored.
        chunk_lengths: (B, C) integers in [0, S]: the first n slots of a chunk are valid, whatever finite or
            non-finite values the others hold. A chunk of length 0 is an empty slot. Default: all are full.
        block_size: how many consecutive queries share one selection.
        scale: factor on the dot products. Default D ** -0.5.
        sink: add 1 to each softmax denominator, so that a query may ignore a chunk (softmax-off-by-one).
        impl: "reference" (the equations, any device and dtype), "cpu" (batched matrix products in plain torch: made
            for the CPU, runs on any device) or "triton" (kernels for CUDA; float32, float16, bfloat16, D <= 256).
            Default: "triton" for CUDA tensors that it supports, where Triton is installed; else "cpu".

    Returns:
        (B, L, h, D) in query's dtype. "cpu" computes 16-bit inputs in float32; "triton" accumulates in it.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the message says what was got and is required.
        ImportError: impl is "triton", which is not installed.
    """
    validation.check_grouped(
        query, chunk_keys, chunk_values, chunk_indices, chunk_weights, chunk_lengths, block_size
    )
    module = _implementation(impl, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output: torch.Tensor = module.grouped_cross_attention(
        query,
        chunk_keys,
        chunk_values,
        chunk_indices,
        chunk_weights,
        chunk_lengths,
        block_size=block_size,
        scale=scale,
        sink=bool(sink),
    )
    return output


def attend_gathered_chunks(
    query: torch.Tensor,
    gathered_keys: torch.Tensor,
    gathered_values: torch.Tensor,
    chunk_weights: torch.Tensor,
    *,
    gathered_lengths: torch.Tensor | None = None,
    block_size: int,
    scale: float | None = None,
    sink: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """The mathematics of `grouped_cross_attention` on chunks that were already gathered.

    For chunks that come from host memory or an archive, or that are gathered once and shared by several layers.

    Args:
        query: (B, L, h, D), L = N * block_size.
        gathered_keys: (B, N, K, S, h_kv, D); slot k of block n holds the keys of its k-th chunk. The layout that
            `gather_chunks` returns is read without a copy.
        gathered_values: (B, N, K, S, h_kv, D).
        chunk_weights: (B, N, K), any floating dtype.
        gathered_lengths: (B, N, K) integers in [0, S]: the first n positions of a slot are valid, 0 is an empty
            slot, which adds exactly 0. Invalid positions must hold finite values. Default: all are full.
        block_size, scale, sink, impl: as in `grouped_cross_attention`.

    Returns:
        (B, L, h, D) in query's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the message says what was got and is required.
    """
    validation.check_gathered(
        query, gathered_keys, gathered_values, chunk_weights, gathered_lengths, block_size
    )
    module = _implementation(impl, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output: torch.Tensor = module.attend_gathered_chunks(
        query,
        gathered_keys,
        gathered_values,
        chunk_weights,
        gathered_lengths,
        block_size=block_size,
        scale=scale,
        sink=bool(sink),
    )
    return output


def gather_chunks(chunk_keys: torch.Tensor, chunk_indices: torch.Tensor) -> torch.Tensor:
    """Copy the selected chunks out of a table of chunks, for `attend_gathered_chunks`.

    Args:
        chunk_keys: (B, C, S, h_kv, D), keys or values.
        chunk_indices: (B, N, K) integers in [0, C); -1 is an empty slot.

    Returns:
        (B, N, K, S, h_kv, D). Its memory is laid out (B, N, h_kv, K, S, D), as `attend_gathered_chunks` reads it.
        An empty slot holds some chunk of the table (zeros if C = 0): give it length 0. Differentiable; the
        gradient of a chunk is the sum over the slots that hold it.

    Raises:
        ValueError: shapes or indices do not fit.
    """
    validation.check_table(chunk_keys, chunk_indices)
    batch, chunks, size, kv_heads, dim = chunk_keys.shape
    _, blocks, slots = chunk_indices.shape
    if chunks == 0:
        return chunk_keys.new_zeros(batch, blocks, slots, size, kv_heads, dim)
    # One row a (chunk, head): the rows of a block's head come out side by side, ready for one matrix product.
    table = chunk_keys.transpose(2, 3).reshape(batch * chunks * kv_heads, size * dim)
    rows = chunk_rows(chunk_indices, chunks, kv_heads)
    gathered = table.index_select(0, rows.flatten())
    return gathered.view(batch, blocks, kv_heads, slots, size, dim).permute(0, 1, 3, 4, 2, 5)


def chunk_rows(chunk_indices: torch.Tensor, chunks: int, kv_heads: int) -> torch.Tensor:
    """Rows of a (B * C * h_kv, ...) table for indices (B, N, K): (B, N, h_kv, K), empty slots read chunk 0."""
    batch = chunk_indices.shape[0]
    first = torch.arange(batch, device=chunk_indices.device).view(batch, 1, 1, 1) * chunks
    head = torch.arange(kv_heads, device=chunk_indices.device).view(1, 1, kv_heads, 1)
    return (first + chunk_indices.long().clamp(min=0).unsqueeze(2)) * kv_heads + head


def _implementation(name: str | None, query: torch.Tensor) -> ModuleType:
    # Imported here: Triton is optional, and slow to import.
    if name is None and query.device.type == "cuda" and HAS_TRITON:
        from drt.ops.grouped_cross_attention.impl import triton

        if triton.supports(query):
            return triton
    match name:
        case "triton":
            from drt.ops.grouped_cross_attention.impl import triton

            return triton
        case "cpu" | None:
            from drt.ops.grouped_cross_attention.impl import cpu

            return cpu
        case "reference":
            from drt.ops.grouped_cross_attention.impl import reference

            return reference
    raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)} or None; got {name!r}")
