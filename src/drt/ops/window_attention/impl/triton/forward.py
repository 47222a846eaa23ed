# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Forward: a program a tile of queries and head, over the keys that the tile sees."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.window_attention.impl.triton.primitives import band_scores, load_matrix
from drt.ops.window_attention.impl.triton.problem import Problem


@triton.jit
def forward_kernel(
    query,
    keys,
    values,
    key_start,
    slopes,
    output,
    log_sums,
    length,
    key_length,
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
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    past = key_length - length
    q_base = query + batch * query_batch + head * query_head
    q = load_matrix(q_base, rows, query_position, rows < length, dims, DIM)
    k_base = batch * key_batch + head // GROUP * key_head
    start = tl.load(key_start + batch).to(tl.int32) if STARTS else 0
    slope = tl.load(slopes + head) if ALIBI else 0.0
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first = tl.maximum(tile * BLOCK_Q + past - (WINDOW - 1), start)
    last = tl.minimum(tile * BLOCK_Q + past + BLOCK_Q, key_length)
    for column in range(first, last, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        k = load_matrix(keys + k_base, columns, key_position, columns < key_length, dims, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        distance = (rows + past)[:, None] - columns[None, :]
        scores = band_scores(scores, distance, scale_log2, slope, WINDOW, ALIBI)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Nothing visible yet: subtracting -inf from -inf would be NaN, and any finite shift serves.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(largest - shift)
        total = total * correction + tl.sum(p, 1)
        v = load_matrix(values + k_base, columns, key_position, columns < key_length, dims, DIM)
        result = result * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.where(total == 0.0, 1.0, total)
    row = (batch * length + rows) * HEADS + head
    tl.store(log_sums + row, shift + tl.log2(total), mask=rows < length)
    target = row[:, None] * DIM + dims[None, :]
    mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    tl.store(output + target, (result / total[:, None]).to(output.dtype.element_ty), mask=mask)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """The output (B, Lq, h, D), contiguous, and log2 of every softmax's denominator (B, Lq, h)."""
    query = problem.query
    output = query.new_empty(query.shape)
    log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    constants = problem.constants()
    forward_kernel[(triton.cdiv(problem.length, constants["BLOCK_Q"]), problem.batch * problem.heads)](
        query,
        problem.keys,
        problem.values,
        problem.key_start,
        problem.slopes,
        output,
        log_sums,
        problem.length,
        problem.key_length,
        problem.scale_log2(),
        *problem.strides,
        **constants,
    )
    return output, log_sums
