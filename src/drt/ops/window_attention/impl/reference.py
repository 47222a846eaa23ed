"""The equations of window attention, dense: an oracle for tests, not for use."""

from __future__ import annotations

import torch
from torch import Tensor


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    key_start: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as in `drt.ops.window_attention.window_attention`; holds an Lq x Lk matrix."""
    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    keys = torch.arange(key.shape[1], device=key.device)
    distance = keys[key.shape[1] - query.shape[1] :, None] - keys
    seen = ((distance >= 0) & (distance < window)).expand(query.shape[0], -1, -1)
    if key_start is not None:
        seen = seen & (keys >= key_start.view(-1, 1, 1))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, 1, 1) * distance
    # Finite, so that a query which sees no key gets weights 0 and not NaN.
    scores = scores.masked_fill(~seen.unsqueeze(1), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).masked_fill(~seen.unsqueeze(1), 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)
