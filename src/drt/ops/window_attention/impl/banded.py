"""Window attention in blocks: plain batched products, linear in the length, on any device.

Queries are cut into blocks of b positions; a block sees a fixed number of keys before its own, b + W - 1 in all
(rounded up), so the scores of all blocks are one batched product and one bias of (h, b, b + W - 1) serves them all.
Keys that do not exist (before ``key_start``) lie in the first blocks only; those blocks alone get a mask of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MAX_BLOCK = 64  # queries of a block


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
    _batch, length, _heads, _dim = query.shape
    past = key.shape[1] - length
    block = min(length, MAX_BLOCK)
    blocks = -(-length // block)
    reach = window - 1  # keys before a block that its first query may see
    tail = blocks * block - length
    # Key position 0 of the padded keys is `reach` positions before the first query.
    front = reach - past
    key, value = (
        pad(x, (0, 0, 0, 0, max(front, 0), tail))[:, max(-front, 0) :].transpose(1, 2) for x in (key, value)
    )
    if key_start is None:
        furthest = max(front, 0)
        first = torch.full((1,), furthest, device=query.device)
    else:
        first = key_start + front
        # Read before the overlapping views below are made: reading a number splits a compiled graph, and a view
        # whose elements share memory must not be where two graphs meet (its gradient would be wrong).
        furthest = int(first.max())
    reaching = min(blocks, -(-furthest // block))  # blocks with slots before the first key
    query = pad(query * scale, (0, 0, 0, 0, 0, tail)).transpose(1, 2).unflatten(2, (blocks, block))
    span = block + reach
    key, value = (
        x.unfold(2, span, block).transpose(-1, -2) for x in (key, value)
    )  # (B, h_kv, blocks, span, D)
    bias = _bias(block, span, window, alibi_slopes, query)
    missing = _missing(first, reaching, block, span) if reaching > 0 else None
    output = _attend(query, key, value, bias, missing)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _bias(block: int, span: int, window: int, slopes: Tensor | None, like: Tensor) -> Tensor:
    """(h or 1, block, span): ALiBi inside the band, -inf outside."""
    slot = torch.arange(span, device=like.device)
    distance = slot[window - 1 :, None] - slot
    outside = (distance < 0) | (distance >= window)
    dtype = torch.promote_types(like.dtype, torch.float32)
    slopes = torch.zeros(1, device=like.device) if slopes is None else slopes
    bias = -slopes.to(dtype).view(-1, 1, 1) * distance
    return bias.masked_fill(outside, -torch.inf).to(like.dtype)


def _missing(first: Tensor, reaching: int, block: int, span: int) -> Tensor:
    """(B or 1, reaching, span) bool for the first blocks: slots that hold no key."""
    start = torch.arange(reaching, device=first.device).view(1, -1, 1) * block
    return start + torch.arange(span, device=first.device) < first.view(-1, 1, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, missing: Tensor | None) -> Tensor:
    """(B, h, blocks, b, D) queries over (B, h_kv, blocks, span, D) keys."""
    heads, kv_heads = query.shape[1], key.shape[1]
    _blocks, block = query.shape[2:4]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads)).transpose(2, 3).flatten(3, 4)
    scores = grouped @ key.transpose(-1, -2)  # (B, h_kv, blocks, heads / h_kv * b, span)
    scores = scores.view(*scores.shape[:3], -1, block, scores.shape[-1])
    scores = (
        scores + bias.view(1, -1, 1, 1, *bias.shape[1:])
        if bias.shape[0] == 1
        else scores + bias.view(1, kv_heads, 1, -1, *bias.shape[1:])
    )
    if missing is None:
        weights = torch.softmax(scores, -1)
    else:
        hidden = missing[:, None, :, None, None, :]
        reaching = missing.shape[1]
        # Finite, so that a query which sees no key (padding) gets weights 0 and not NaN.
        head = scores[:, :, :reaching].masked_fill(hidden, torch.finfo(scores.dtype).min)
        head = torch.softmax(head, -1).masked_fill(hidden, 0)
        weights = torch.cat([head, torch.softmax(scores[:, :, reaching:], -1)], 2)
    output = weights.flatten(3, 4) @ value
    return output.unflatten(3, (-1, block)).transpose(2, 3).flatten(1, 2)
