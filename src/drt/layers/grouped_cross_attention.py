"""Grouped cross-attention of a layer's positions to the chunks that their group retrieved."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drt.layers.rms_norm import RMSNorm
from drt.ops.grouped_cross_attention import attend_gathered_chunks, grouped_cross_attention


class RetrievedMemory(NamedTuple):
    """What one group retrieved for each of N blocks of positions.

    Attributes:
        keys: either the chunks at hand, (B, C, S, h_kv, D), to be read through ``chunk_indices``, or what was read
            from a store already, (B, N, K, S, h_kv, D).
        values: like ``keys``.
        lengths: tokens in each chunk, (B, C) or (B, N, K) accordingly; 0 for an empty slot.
        chunk_indices: (B, N, K), -1 for an empty slot.
        chunk_weights: (B, N, K) float32, differentiable.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    chunk_indices: Tensor
    chunk_weights: Tensor

    def attend(self, query: Tensor, sink: bool) -> Tensor:
        """(B, N * block_size, h, D) queries to outputs of that shape."""
        block_size = query.shape[1] // self.chunk_weights.shape[1]
        if self.keys.dim() == 6:
            return attend_gathered_chunks(
                query,
                self.keys,
                self.values,
                self.chunk_weights,
                gathered_lengths=self.lengths,
                block_size=block_size,
                sink=sink,
            )
        return grouped_cross_attention(
            query,
            self.keys,
            self.values,
            self.chunk_indices,
            self.chunk_weights,
            chunk_lengths=self.lengths,
            block_size=block_size,
            sink=sink,
        )


class _Rearrange(torch.autograd.Function):
    """Gather rows by an injective index (-1: anything); the backward pass gathers by the inverse index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index.clamp_min(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        gathered = grad.index_select(0, inverse.clamp_min(0))
        return gathered.masked_fill_((inverse < 0).view(-1, *[1] * (grad.dim() - 1)), 0), None, None


def rearrange(tensor: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Move slots of a batch: (B, M, ...) to (B, N, ...).

    Args:
        tensor: (B, M, ...).
        index: (B, N) flat index into the first two dimensions of ``tensor``, each slot used at most once; -1 for a
            slot whose content does not matter and whose gradient is dropped.
        inverse: (B, M) flat index of each source slot in the result, -1 for one that is not used.
    """
    rows = _Rearrange.apply(tensor.flatten(0, 1), index.reshape(-1), inverse.reshape(-1))
    return rows.unflatten(0, index.shape)


class GroupedCrossAttention(nn.Module):
    """One softmax per retrieved chunk, fused with the retrieval weights (section 3.2 of the paper).

    Keys and values come ready from the chunk memory, shared by all layers; this block owns the query and output
    projections and the norm before them.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, sink: bool, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.sink = sink
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, memory: RetrievedMemory, block_index: Tensor, block_inverse: Tensor
    ) -> Tensor:
        """Attend from compact positions.

        Args:
            hidden_states: (B, L, hidden_size).
            memory: what each of N blocks of positions reads.
            block_index: (B, N * block_size) flat compact position of each query slot, -1 for none.
            block_inverse: (B, L) flat query slot of each position, -1 for padding.

        Returns:
            (B, L, hidden_size).
        """
        query = self.q_proj(self.norm(hidden_states))
        query = rearrange(query, block_index, block_inverse).unflatten(-1, (-1, self.head_dim))
        output = self.attend(query, memory)
        return self.o_proj(rearrange(output.flatten(-2), block_inverse, block_index))

    def attend(self, query: Tensor, memory: RetrievedMemory) -> Tensor:
        """(B, N * block_size, h, D) queries to outputs of that shape."""
        return memory.attend(query, self.sink)
