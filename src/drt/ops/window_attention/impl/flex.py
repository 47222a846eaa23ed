"""Window attention by PyTorch's FlexAttention: a block mask for the band, a score function for ALiBi.

Compiled on a GPU; on the CPU it runs as plain operations, dense and without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's own default


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
    inlined = torch.compiler.is_compiling() or query.device.type == "cpu"
    attend = _attend if inlined else _compiled()
    if query.numel() == 0:  # FlexAttention has no mask of no blocks
        return query.clone()
    return attend(query, key, value, window, key_start, alibi_slopes, scale)


@cache
def _compiled() -> Callable[..., Tensor]:
    # With lengths as symbols, torch 2.11 fails to compile a score function that uses them.
    return torch.compile(_attend, dynamic=False)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    key_start: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    past = key.shape[1] - query.shape[1]

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = row + past - column
        inside = (distance >= 0) & (distance < window)
        return inside if key_start is None else inside & (column >= key_start[batch])

    def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        assert alibi_slopes is not None
        return score - alibi_slopes[head] * (row + past - column)

    mask = _band(query.shape[1], key.shape[1], window, query.device)
    mask.mask_mod = visible
    output = flex_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        score_mod=None if alibi_slopes is None else biased,
        block_mask=mask,
        scale=scale,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return output.transpose(1, 2)


def _band(queries: int, keys: int, window: int, device: torch.device) -> BlockMask:
    """Blocks of keys that some query of a block of queries sees, without looking at each pair of positions."""
    past = keys - queries
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    first_position = torch.arange(rows, device=device, dtype=torch.int32) * BLOCK + past
    first = (first_position - (window - 1)).clamp_min(0) // BLOCK
    last = ((first_position + BLOCK - 1) // BLOCK).clamp_max(columns - 1)
    column = torch.arange(columns, device=device, dtype=torch.int32)
    indices = (first.unsqueeze(1) + column).clamp_max(columns - 1)
    return BlockMask.from_kv_blocks(
        (last - first + 1)[None, None], indices[None, None], BLOCK_SIZE=BLOCK, seq_lengths=(queries, keys)
    )
