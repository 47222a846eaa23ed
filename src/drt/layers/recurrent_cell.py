"""The recurrent cell of the Block-Recurrent Transformer (arXiv 2203.07852), its `fixed:skip` form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drt.layers.rms_norm import RMSNorm
from drt.layers.window_attention import WindowAttention, WindowState


class OpenBlock(NamedTuple):
    """What the cell carries from one pass to the next.

    Attributes:
        state: (B, R, H) after the last full block.
        keys: (B, S, h_kv, D) of the block that is not yet full, first slots first.
        values: like keys.
        lengths: (B,) tokens in it (on the CPU).
    """

    state: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor


class RecurrentCell(WindowAttention):
    """Window attention beside attention to a state of R vectors, which changes after every block of tokens.

    Tokens to states (vertical): each token attends to its window and to the state before its block; both results are
    projected together. States to tokens (horizontal): each state vector attends to the state and to the block's
    tokens; what comes out is mixed into it through a gate that is learned and does not depend on the input. Keys and
    values of the tokens and of the states are shared by the two directions, queries are not (section 3).

    Args:
        hidden_size, num_heads, num_key_value_heads, head_dim, window, position_embedding, rope_theta: as in
            `WindowAttention`.
        num_states: vectors R of the state.
        block_size: tokens S of a block.
        eps: epsilon of the norm on the state.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int,
        position_embedding: str,
        rope_theta: float,
        num_states: int,
        block_size: int,
        eps: float,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_key_value_heads, head_dim, window, position_embedding, rope_theta
        )
        width, memory_width = num_heads * head_dim, num_key_value_heads * head_dim
        self.block_size = block_size
        self.first_state = nn.Parameter(torch.empty(num_states, hidden_size))
        self.state_ids = nn.Parameter(torch.empty(num_states, hidden_size))
        self.state_norm = RMSNorm(hidden_size, eps=eps)
        self.token_to_state_q_proj = nn.Linear(hidden_size, width, bias=False)
        self.state_to_state_q_proj = nn.Linear(hidden_size, width, bias=False)
        self.state_to_token_q_proj = nn.Linear(hidden_size, width, bias=False)
        self.state_k_proj = nn.Linear(hidden_size, memory_width, bias=False)
        self.state_v_proj = nn.Linear(hidden_size, memory_width, bias=False)
        self.cross_o_proj = nn.Linear(width, hidden_size, bias=False)  # with o_proj: one projection of both
        self.state_o_proj = nn.Linear(2 * width, hidden_size)
        self.gate_bias = nn.Parameter(torch.empty(hidden_size))

    def first(self, batch_size: int, like: Tensor) -> OpenBlock:
        """Before the first token; like: (..., h_kv, D) keys."""
        empty = like.new_zeros(batch_size, self.block_size, *like.shape[-2:])
        state = self.first_state.expand(batch_size, -1, -1)
        return OpenBlock(state, empty, empty, torch.zeros(batch_size, dtype=torch.long, device="cpu"))

    def forward(  # type: ignore[override]  # it carries a state
        self,
        hidden_states: Tensor,
        carried: OpenBlock | None,
        row_lengths: Tensor | None,
        window: WindowState | None,
    ) -> tuple[Tensor, OpenBlock]:
        """Read new tokens, block by block.

        Args:
            hidden_states: (B, P, hidden_size), rows packed to slot 0.
            carried: from the pass before; ``None``: a new text.
            row_lengths: (B,) tokens of each row (on the CPU); ``None``: P.
            window: keys and values of earlier passes.

        Returns:
            (B, P, hidden_size) and what to carry on.
        """
        query, keys, values = self.project(hidden_states)
        local = self.attend(query, keys, values, window)
        asking = self.token_to_state_q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        batch_size, length = hidden_states.shape[:2]
        block = self.first(batch_size, keys) if carried is None else carried
        new = torch.full((batch_size,), length, device="cpu") if row_lengths is None else row_lengths
        rows = torch.arange(batch_size, device=keys.device).unsqueeze(1)
        slots = torch.arange(self.block_size, device="cpu")
        crossed = asking.new_zeros(
            batch_size, length + 1, *asking.shape[2:]
        )  # the last slot takes what is no token
        done = block.lengths  # tokens of each row's block before its first new one
        for number in range(-(-(int(done.max()) + length) // self.block_size)):
            position = number * self.block_size - done.unsqueeze(1) + slots
            valid = (position >= 0) & (position < new.unsqueeze(1))
            source = position.clamp(0, length - 1).to(keys.device)
            fresh = valid.to(keys.device)[..., None, None]
            memory = self._state_memory(block.state)
            cross = _attend(asking[rows, source], *memory)
            target = torch.where(valid, position, length).to(keys.device)
            crossed = crossed.index_put((rows, target), cross.to(crossed.dtype))
            block = self._fill(block, memory, keys[rows, source], values[rows, source], fresh, valid)
        return local + self.cross_o_proj(crossed[:, :length].flatten(-2)), block

    def _fill(
        self,
        block: OpenBlock,
        memory: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        fresh: Tensor,
        valid: Tensor,
    ) -> OpenBlock:
        """Add a row's new tokens to its block; where that is full, the state changes and a new block begins."""
        keys, values = torch.where(fresh, keys, block.keys), torch.where(fresh, values, block.values)
        lengths = block.lengths + valid.sum(1)
        full = lengths == self.block_size
        state = block.state
        if bool(full.any()):
            changed = self._next_state(state, memory, keys, values)
            state = torch.where(full.to(keys.device)[:, None, None], changed, state)
        return OpenBlock(state, keys, values, lengths.masked_fill(full, 0))

    def _next_state(
        self, state: Tensor, memory: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> Tensor:
        """(B, R, H) after a full block of keys and values (B, S, h_kv, D); memory: the state's own."""
        normed = self.state_norm(state + self.state_ids)
        to_state, to_token = (
            projection(normed).unflatten(-1, (-1, self.head_dim))
            for projection in (self.state_to_state_q_proj, self.state_to_token_q_proj)
        )
        own = _attend(to_state, *memory)
        read = _attend(to_token, keys, values)
        candidate = self.state_o_proj(torch.cat([own.flatten(-2), read.flatten(-2)], -1))
        keep = torch.sigmoid(self.gate_bias)
        return state * keep + candidate * (1 - keep)

    def _state_memory(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, R, h_kv, D) of the state."""
        normed = self.state_norm(state + self.state_ids)
        keys, values = (
            projection(normed).unflatten(-1, (-1, self.head_dim))
            for projection in (self.state_k_proj, self.state_v_proj)
        )
        return keys, values


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, L, h, D) over (B, M, h_kv, D), every key seen."""
    gqa = key.shape[2] != query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=gqa).transpose(1, 2)
