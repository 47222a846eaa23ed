# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Backward: dQ by tiles of queries, dK and dV by tiles of keys: each gradient is written once, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.window_attention.impl.triton.primitives import band_scores, load_matrix
from drt.ops.window_attention.impl.triton.problem import Problem


@triton.jit
def query_kernel(
    query,
    keys,
    values,
    key_start,
    slopes,
    output,
    log_sums,
    grad_output,
    grad_query,
    deltas,
    length,
    key_length,
    scale,
    scale_log2,
    query_batch,
    query_position,
    query_head,
    key_batch,
    key_position,
    key_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    STARTS: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dQ of a tile of queries; also dO . O of each query and head, for `key_kernel`."""
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    past = key_length - length
    q_base = query + batch * query_batch + head * query_head
    q = load_matrix(q_base, rows, query_position, rows < length, dims, DIM)
    row = (batch * length + rows) * HEADS + head
    do = load_matrix(grad_output, row, DIM, rows < length, dims, DIM)
    o = load_matrix(output, row, DIM, rows < length, dims, DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(deltas + row, delta, mask=rows < length)
    log_sum = tl.load(log_sums + row, mask=rows < length, other=0.0)
    k_base = batch * key_batch + head // GROUP * key_head
    start = tl.load(key_start + batch).to(tl.int32) if STARTS else 0
    slope = tl.load(slopes + head) if ALIBI else 0.0
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first = tl.maximum(tile * BLOCK_Q + past - (WINDOW - 1), start)
    last = tl.minimum(tile * BLOCK_Q + past + BLOCK_Q, key_length)
    for column in range(first, last, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        k = load_matrix(keys + k_base, columns, key_position, columns < key_length, dims, DIM)
        v = load_matrix(values + k_base, columns, key_position, columns < key_length, dims, DIM)
        distance = (rows + past)[:, None] - columns[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(band_scores(scores, distance, scale_log2, slope, WINDOW, ALIBI) - log_sum[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    dq = (dq * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + row[:, None] * DIM + dims[None, :], dq, mask=mask)


@triton.jit
def key_kernel(
    query,
    keys,
    values,
    key_start,
    slopes,
    log_sums,
    grad_output,
    deltas,
    grad_keys,
    grad_values,
    length,
    key_length,
    scale,
    scale_log2,
    query_batch,
    query_position,
    query_head,
    key_batch,
    key_position,
    key_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    STARTS: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dK and dV of a tile of keys of one key/value head, over the queries that see them, head by head."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) // KV_HEADS
    kv_head = tl.program_id(1).to(tl.int64) % KV_HEADS
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    past = key_length - length
    start = tl.load(key_start + batch).to(tl.int32) if STARTS else 0
    exists = (columns >= start) & (columns < key_length)
    k_base = batch * key_batch + kv_head * key_head
    k = load_matrix(keys + k_base, columns, key_position, exists, dims, DIM)
    v = load_matrix(values + k_base, columns, key_position, exists, dims, DIM)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first = tl.maximum(tile * BLOCK_K - past, 0)
    last = tl.minimum(tile * BLOCK_K + BLOCK_K + WINDOW - 1 - past, length)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = query + batch * query_batch + head * query_head
        slope = tl.load(slopes + head) if ALIBI else 0.0
        for start_row in range(first, last, BLOCK_Q):
            rows = start_row + tl.arange(0, BLOCK_Q)
            row = (batch * length + rows) * HEADS + head
            q = load_matrix(q_base, rows, query_position, rows < length, dims, DIM)
            do = load_matrix(grad_output, row, DIM, rows < length, dims, DIM)
            log_sum = tl.load(log_sums + row, mask=rows < length, other=0.0)
            delta = tl.load(deltas + row, mask=rows < length, other=0.0)
            # Transposed, (keys, queries). Rows beyond the last are zeros in q and do and add nothing.
            distance = (rows + past)[None, :] - columns[:, None]
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores = band_scores(scores, distance, scale_log2, slope, WINDOW, ALIBI)
            p = tl.where(exists[:, None], tl.exp2(scores - log_sum[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    target = ((batch * key_length + columns) * KV_HEADS + kv_head)[:, None] * DIM + dims[None, :]
    mask = (columns < key_length)[:, None] & (dims < DIM)[None, :]
    tl.store(grad_keys + target, (dk * scale).to(grad_keys.dtype.element_ty), mask=mask)
    tl.store(grad_values + target, dv.to(grad_values.dtype.element_ty), mask=mask)


def backward(
    problem: Problem, output: Tensor, log_sums: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values, contiguous."""
    query, keys = problem.query, problem.keys
    grad_output = grad_output.contiguous()
    grad_query = query.new_empty(query.shape)
    grad_keys, grad_values = keys.new_empty(keys.shape), keys.new_empty(keys.shape)
    deltas = torch.empty_like(log_sums)
    constants = problem.constants(backward=True)
    sizes = (problem.length, problem.key_length, problem.scale, problem.scale_log2(), *problem.strides)
    inputs = (query, keys, problem.values, problem.key_start, problem.slopes)
    query_kernel[(triton.cdiv(problem.length, constants["BLOCK_Q"]), problem.batch * problem.heads)](
        *inputs, output, log_sums, grad_output, grad_query, deltas, *sizes, **constants
    )
    key_kernel[(triton.cdiv(problem.key_length, constants["BLOCK_K"]), problem.batch * keys.shape[2])](
        *inputs, log_sums, grad_output, deltas, grad_keys, grad_values, *sizes, **constants
    )
    return grad_query, grad_keys, grad_values
