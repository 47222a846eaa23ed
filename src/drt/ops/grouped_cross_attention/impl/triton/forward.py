# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Forward: one pass over a block's selected chunks, read where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.grouped_cross_attention.impl.triton.primitives import attend_chunk, load_matrix, row_offsets
from drt.ops.grouped_cross_attention.impl.triton.problem import Problem


@triton.jit
def forward_kernel(
    query,
    keys,
    values,
    indices,
    weights,
    lengths,
    output,
    log_sums,
    blocks_per_batch,
    slots,
    scale_log2,
    stride_batch,
    stride_chunk,
    stride_block,
    stride_slot,
    stride_position,
    stride_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program: one tile of rows of one block and key/value head, over all its slots."""
    ROWS: tl.constexpr = BLOCK_SIZE * GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0).to(tl.int64)
    head = program // TILES % KV_HEADS
    block = program // TILES // KV_HEADS
    rows = (program % TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    offsets = row_offsets(block, head, rows, HEADS, GROUP, DIM, BLOCK_SIZE)
    q = load_matrix(query, offsets, rows < ROWS, dims, DIM)
    base = (
        block // blocks_per_batch * stride_batch
        + block % blocks_per_batch * stride_block
        + head * stride_head
    )
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for slot in range(slots):
        place = block * slots + slot
        chunk = base + tl.load(indices + place).to(tl.int64) * stride_chunk + slot * stride_slot
        result, log_sum = attend_chunk(
            q,
            keys + chunk,
            values + chunk,
            tl.load(lengths + place),
            stride_position,
            scale_log2,
            DIM,
            SIZE,
            SINK,
            PRECISION,
            BLOCK_R,
            BLOCK_D,
            BLOCK_S,
        )
        total += tl.load(weights + place) * result
        place = (block * KV_HEADS + head) * slots + slot
        tl.store(log_sums + place * ROWS + rows, log_sum, mask=rows < ROWS)
    mask = (rows < ROWS)[:, None] & (dims < DIM)[None, :]
    tl.store(output + offsets[:, None] + dims[None, :], total.to(output.dtype.element_ty), mask=mask)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """The output (B, L, h, D), and log2 of every softmax's denominator (B * N, h_kv, K, R)."""
    output, log_sums = torch.empty_like(problem.query), problem.per_row()
    constants = problem.constants()
    tiles = triton.cdiv(problem.rows, constants["BLOCK_R"])
    forward_kernel[(problem.blocks * problem.kv_heads * tiles,)](
        problem.query,
        problem.keys,
        problem.values,
        problem.indices,
        problem.weights,
        problem.lengths,
        output,
        log_sums,
        problem.indices.shape[1],
        problem.slots,
        problem.scale_log2(),
        *problem.strides,
        **constants,
    )
    return output, log_sums
