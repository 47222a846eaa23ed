# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Forward for a few queries: a program a slot, for one program a block would leave most of the device idle.

Each chunk has its own softmax, so the parts need no rescaling: the output is their sum, taken in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.grouped_cross_attention.impl.triton.primitives import attend_chunk, load_matrix, row_offsets
from drt.ops.grouped_cross_attention.impl.triton.problem import Problem


@triton.jit
def decode_kernel(
    query,
    keys,
    values,
    indices,
    weights,
    lengths,
    parts,
    log_sums,
    part_size,
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
    """A program: one tile of rows of one block and key/value head, over one of its slots."""
    ROWS: tl.constexpr = BLOCK_SIZE * GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1).to(tl.int64)
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
    result *= tl.load(weights + place)
    mask = (rows < ROWS)[:, None] & (dims < DIM)[None, :]
    tl.store(parts + slot * part_size + offsets[:, None] + dims[None, :], result, mask=mask)
    place = (block * KV_HEADS + head) * slots + slot
    tl.store(log_sums + place * ROWS + rows, log_sum, mask=rows < ROWS)


def decode(problem: Problem) -> tuple[Tensor, Tensor]:
    """What `forward` returns, split over slots."""
    query = problem.query
    parts = query.new_empty(problem.slots, *query.shape, dtype=torch.float32)
    log_sums = problem.per_row()
    constants = problem.constants()
    tiles = triton.cdiv(problem.rows, constants["BLOCK_R"])
    decode_kernel[(problem.blocks * problem.kv_heads * tiles, problem.slots)](
        query,
        problem.keys,
        problem.values,
        problem.indices,
        problem.weights,
        problem.lengths,
        parts,
        log_sums,
        query.numel(),
        problem.indices.shape[1],
        problem.slots,
        problem.scale_log2(),
        *problem.strides,
        **constants,
    )
    return parts.sum(dim=0).to(query.dtype), log_sums
