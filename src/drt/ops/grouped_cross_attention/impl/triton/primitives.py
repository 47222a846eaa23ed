# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""What the kernels share: where rows and chunks lie, and one chunk's attention.

A *row* is one query of one query head. The rows of a block that share a key/value head, R = block_size * h / h_kv
of them, share their chunks too and form the matrices. Queries, outputs and their gradients are contiguous
(B, L, h, D), so one offset serves them all. Scores are kept in units of log 2:
exp2 is the instruction that the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(
    block, head, rows, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Offsets of a block's rows for one key/value head; `block` counts over the batch, b * N + n, as int64."""
    token = block * BLOCK_SIZE + rows // GROUP
    return (token * HEADS + head * GROUP + rows % GROUP) * DIM


@triton.jit
def load_matrix(base, row_offset, row_mask, dims, DIM: tl.constexpr):
    """Rows as a matrix (rows, BLOCK_D); 0 beyond the last row and beyond D."""
    mask = row_mask[:, None] & (dims < DIM)[None, :]
    return tl.load(base + row_offset[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def masked_scores(q, k, valid, scale_log2, PRECISION: tl.constexpr):
    """(rows, positions) scores in units of log 2, -inf where a position is not valid; k is (positions, D)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    return tl.where(valid[None, :], scores, float("-inf"))


@triton.jit
def attend_chunk(
    q,
    keys,
    values,
    length,
    stride_position,
    scale_log2,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One chunk's softmax attention: (rows, BLOCK_D) float32, and log2 of each row's denominator.

    The sink is a term exp(0), there from the start. An empty chunk loads nothing and gives 0.
    """
    dims = tl.arange(0, BLOCK_D)
    largest = tl.full((BLOCK_R,), 0.0 if SINK else float("-inf"), tl.float32)
    total = tl.full((BLOCK_R,), 1.0 if SINK else 0.0, tl.float32)
    output = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, SIZE, BLOCK_S):
        positions = start + tl.arange(0, BLOCK_S)
        valid = positions < length
        offsets = positions.to(tl.int64) * stride_position
        k = load_matrix(keys, offsets, valid, dims, DIM)
        scores = masked_scores(q, k, valid, scale_log2, PRECISION)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Nothing valid yet: subtracting -inf from -inf would be NaN, and any finite shift serves.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(largest - shift)
        total = total * correction + tl.sum(p, 1)
        v = load_matrix(values, offsets, valid, dims, DIM)
        output = output * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.where(total == 0.0, 1.0, total)
    return output / total[:, None], shift + tl.log2(total)
