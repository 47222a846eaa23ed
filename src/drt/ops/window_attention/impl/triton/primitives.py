# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""What the kernels share. Positions are int32, offsets int64.

Scores are kept in units of log 2: exp2 is the instruction that the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_matrix(base, rows, stride, row_mask, dims, DIM: tl.constexpr):
    """Rows as a matrix (rows, BLOCK_D); 0 beyond the last row and beyond D."""
    mask = row_mask[:, None] & (dims < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def band_scores(products, distance, scale_log2, slope, WINDOW: tl.constexpr, ALIBI: tl.constexpr):
    """Scores from dot products and distances back: -inf outside the band. `slope` is in units of log 2 too."""
    scores = products * scale_log2
    if ALIBI:
        scores -= slope * distance.to(tl.float32)
    return tl.where((distance >= 0) & (distance < WINDOW), scores, float("-inf"))
