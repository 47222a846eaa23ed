"""Landmark Attention as a block (arXiv 2305.16300)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drt.layers.full_attention import GrowingState
from drt.ops.landmark_attention import grouped_softmax_attention, retrieving_attention
from drt.ops.window_attention import apply_rope


class LandmarkAttention(nn.Module):
    """Grouped softmax over everything in training; over local and retrieved chunks otherwise.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads h.
        num_key_value_heads: key/value heads, a divisor of h.
        head_dim: width D of a head.
        chunk_size: tokens S of a chunk.
        top_k: chunks that a query retrieves.
        local_chunks: chunks before the query's own that are always read.
        max_distance: furthest distance in chunks that positions tell apart.
        rope_theta: base of the rotary angles.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        chunk_size: int,
        top_k: int,
        local_chunks: int,
        max_distance: int,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.local_chunks = local_chunks
        self.max_distance = max_distance
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, held: Tensor, state: GrowingState | None = None) -> Tensor:
        """(B, P, hidden_size) slots to the same; held (B,) on the CPU counts each row's slots before them."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        slots = torch.arange(query.shape[1], device="cpu")
        if self.training and state is None:
            query, key = (apply_rope(x, slots.to(x.device), self.rope_theta) for x in (query, key))
            output = grouped_softmax_attention(query, key, value, self.chunk_size)
            return self.o_proj(output.flatten(-2))
        inside = (held.unsqueeze(1) + slots) % (self.chunk_size + 1)
        key = apply_rope(key, inside.to(key.device), self.rope_theta)
        if state is not None:
            key, value = state.update(key, value)
        output = retrieving_attention(
            query,
            key,
            value,
            held,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
            local_chunks=self.local_chunks,
            max_distance=self.max_distance,
            rope_theta=self.rope_theta,
        )
        return self.o_proj(output.flatten(-2))
