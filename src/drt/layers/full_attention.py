"""Causal self-attention over everything before, in memory linear in the length."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drt.ops.window_attention import alibi_slopes, apply_rope

QUERY_BLOCK = 512  # queries that share a mask, so that no mask is quadratic in the length


class GrowingState(Protocol):
    """The keys and values that a layer keeps between passes."""

    @property
    def lengths(self) -> Tensor | None:
        """(B,) on the CPU: positions held of each row; ``None``: none."""
        ...

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Take new (B, L, h_kv, D); return held + new (B, M, h_kv, D), each row packed to slot 0."""
        ...


class FullAttention(nn.Module):
    """Causal attention of each position to all before it.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads h.
        num_key_value_heads: key/value heads, a divisor of h.
        head_dim: width D of a head.
        position_embedding: ``"alibi"`` or ``"rope"``.
        rope_theta: base of the rotary angles.
    """

    alibi_slopes: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        position_embedding: str,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        slopes = alibi_slopes(num_heads) if position_embedding == "alibi" else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def forward(self, hidden_states: Tensor, state: GrowingState | None = None) -> Tensor:
        """(B, L, hidden_size) to the same; ``state`` holds the keys and values of earlier passes."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = None if state is None else state.lengths
        if self.alibi_slopes is None:
            positions = torch.arange(query.shape[1], device=query.device)
            if past is not None:
                positions = past.to(query.device).unsqueeze(1) + positions
            query = apply_rope(query, positions, self.rope_theta)
            key = apply_rope(key, positions, self.rope_theta)
        if state is not None:
            key, value = state.update(key, value)
        return self.o_proj(causal_attention(query, key, value, past, self.alibi_slopes).flatten(-2))


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor | None, slopes: Tensor | None
) -> Tensor:
    """Attention of query i of row b to the keys 0 .. past[b] + i.

    Args:
        query: (B, L, h, D).
        key: (B, M, h_kv, D), rows at slot 0, finite behind their ends; value likewise.
        past: (B,) on the CPU, keys before the first query; ``None``: 0.
        slopes: (h,) ALiBi slopes; ``None``: no bias.

    Returns:
        (B, L, h, D).
    """
    length = query.shape[1]
    gqa = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if slopes is None and (past is None or not bool(past.any())):
        output = F.scaled_dot_product_attention(
            query, key[:, :, :length], value[:, :, :length], is_causal=True, enable_gqa=gqa
        )
        return output.transpose(1, 2)
    if past is None:
        past = torch.zeros(1, dtype=torch.long, device="cpu")
    elif bool((past == past[0]).all()):
        past = past[:1]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        block = query[:, :, start : start + QUERY_BLOCK]
        seen = int(past.max()) + start + block.shape[2]
        mask = _mask(past.to(query.device) + start, block.shape[2], seen, slopes, block)
        outputs.append(
            F.scaled_dot_product_attention(
                block, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, enable_gqa=gqa
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _mask(first: Tensor, length: int, seen: int, slopes: Tensor | None, like: Tensor) -> Tensor:
    """(B or 1, h or 1, length, seen): which keys the queries at first + 0 .. length - 1 see, or their bias."""
    query = first.view(-1, 1, 1) + torch.arange(length, device=like.device).view(-1, 1)
    distance = (query - torch.arange(seen, device=like.device)).unsqueeze(1)
    if slopes is None:
        return distance >= 0
    bias = -slopes.view(-1, 1, 1).to(torch.promote_types(like.dtype, torch.float32)) * distance
    return bias.masked_fill(distance < 0, -torch.inf).to(like.dtype)
