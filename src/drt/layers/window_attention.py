"""Self-attention over a sliding window."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from drt.ops.window_attention import alibi_slopes, apply_rope, window_attention


class WindowState(Protocol):
    """The keys and values that a layer keeps between passes."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take new (B, L, h_kv, D); return held + new, and each row's first valid slot (B,) or None for 0."""
        ...


class WindowAttention(nn.Module):
    """Causal attention of each position to the last ``window`` positions, itself included.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads h.
        num_key_value_heads: key/value heads, a divisor of h.
        head_dim: width D of a head.
        window: keys W that a position sees.
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
        window: int,
        position_embedding: str,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        slopes = alibi_slopes(num_heads) if position_embedding == "alibi" else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def forward(self, hidden_states: Tensor, state: WindowState | None = None) -> Tensor:
        """(B, L, hidden_size) to the same; ``state`` holds the keys and values of earlier passes."""
        return self.attend(*self.project(hidden_states), state)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, hidden_size) to queries (B, L, h, D), keys and values (B, L, h_kv, D)."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: WindowState | None) -> Tensor:
        """What `project` gives to the output, (B, L, hidden_size)."""
        key_start = None
        if state is not None:
            key, value, key_start = state.update(key, value)
        if self.alibi_slopes is None:
            # Only differences of positions matter: counting from the first key at hand keeps the angles small.
            positions = torch.arange(key.shape[1], device=key.device)
            query = apply_rope(query, positions[-query.shape[1] :], self.rope_theta)
            key = apply_rope(key, positions, self.rope_theta)
        output = window_attention(
            query, key, value, window=self.window, key_start=key_start, alibi_slopes=self.alibi_slopes
        )
        return self.o_proj(output.flatten(-2))
