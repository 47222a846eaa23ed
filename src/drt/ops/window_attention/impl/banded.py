"""Window attention in blocks: torch's own attention on short overlapping pieces, linear in the length, on any device.

Queries are cut into blocks of b positions; a block sees a fixed number of keys before its own, b + W - 1 in all, so
that all blocks are one batch of small dense problems and one bias of (h, b, b + W - 1) serves them all. The keys of
neighbouring blocks are overlapping views of one tensor, nothing is copied: positions lead, rows and heads share a
dimension, and the queries of heads that share keys are rows of one matrix. Keys that do not exist (before
``key_start``) lie in the first blocks only; those blocks alone get a bias of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Queries of a block, for windows up to 256 and beyond: a small block wastes few products on keys outside the band,
# a large one has fewer overlapping gradients to add up.
SMALL_BLOCK, LARGE_BLOCK, SMALL_WINDOW = 32, 64, 256


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
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    block = min(length, SMALL_BLOCK if window <= SMALL_WINDOW else LARGE_BLOCK)
    blocks = -(-length // block)
    reach = window - 1  # keys before a block that its first query may see
    tail = blocks * block - length
    # Key position 0 of the padded keys is `reach` positions before the first query.
    front = reach - (key.shape[1] - length)
    if key_start is None:
        furthest = max(front, 0)
        first = torch.full((1,), furthest, device=query.device)
    else:
        first = key_start + front
        # Read before the overlapping views below are made: reading a number splits a compiled graph, and a view
        # whose elements share memory must not be where two graphs meet (its gradient would be wrong).
        furthest = int(first.max())
    reaching = min(blocks, -(-furthest // block))  # blocks with slots before the first key
    span = block + reach
    key, value = (_pieces(x, front, tail, span, block) for x in (key, value))
    query = pad(query, (0, 0, 0, 0, 0, tail)).unflatten(1, (blocks, block)).unflatten(3, (kv_heads, -1))
    query = query.permute(1, 0, 3, 4, 2, 5).reshape(blocks, batch * kv_heads, -1, dim)
    bias = _bias(block, span, window, alibi_slopes, query).expand(heads, -1, -1)
    bias = bias.reshape(kv_heads, -1, span).repeat(batch, 1, 1)  # as the queries of one block
    output = _attend(query, key, value, bias, _missing(first, reaching, block, span), scale)
    output = output.reshape(blocks, batch, heads, block, dim).permute(1, 0, 3, 2, 4)
    return output.flatten(1, 2)[:, :length]


def _pieces(x: Tensor, front: int, tail: int, span: int, block: int) -> Tensor:
    """(B, Lk, h_kv, D) to the keys or values of each block, (blocks, B * h_kv, span, D), overlapping views."""
    x = pad(x.transpose(0, 1), (0, 0, 0, 0, 0, 0, max(front, 0), tail))[max(-front, 0) :]
    return x.flatten(1, 2).unfold(0, span, block).transpose(-1, -2)


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


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, missing: Tensor, scale: float) -> Tensor:
    """(blocks, B * h_kv, rows, D) queries over (blocks, B * h_kv, span, D) keys."""
    reaching = missing.shape[1]
    if reaching == 0:
        return scaled_dot_product_attention(query, key, value, bias.unsqueeze(0), scale=scale)
    hidden = missing.transpose(0, 1).repeat_interleave(bias.shape[0] // missing.shape[0], 1).unsqueeze(2)
    # Finite, so that a query which sees no key (padding) gets no NaN; its output is then set to 0.
    least = torch.finfo(bias.dtype).min
    sees_none = (hidden | (bias == -torch.inf)).all(-1, keepdim=True)
    head = scaled_dot_product_attention(
        query[:reaching],
        key[:reaching],
        value[:reaching],
        bias.masked_fill(hidden, -torch.inf).masked_fill(sees_none, least),
        scale=scale,
    ).masked_fill(sees_none, 0)
    if reaching == len(query):
        return head
    rest = scaled_dot_product_attention(
        query[reaching:], key[reaching:], value[reaching:], bias.unsqueeze(0), scale=scale
    )
    return torch.cat([head, rest])
