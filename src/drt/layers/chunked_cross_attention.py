"""Chunked cross-attention: one softmax over the concatenated chunks, without weights (RETRO, arXiv 2112.04426)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from drt.layers.grouped_cross_attention import GroupedCrossAttention, RetrievedMemory
from drt.ops.grouped_cross_attention import gather_chunks


class ChunkedCrossAttention(GroupedCrossAttention):
    """What grouped cross-attention is compared with; the same projections, norm and arguments.

    The retrieval weights play no part, so nothing tells a retriever what would have been better to retrieve.
    """

    def attend(self, query: Tensor, memory: RetrievedMemory) -> Tensor:
        """(B, N * block_size, h, D) queries to outputs of that shape; zeros where a block retrieved nothing."""
        batch_size, blocks, slots = memory.chunk_indices.shape
        keys, values, lengths = memory.keys, memory.values, memory.lengths
        if keys.dim() == 5:
            keys, values = (gather_chunks(table, memory.chunk_indices) for table in (keys, values))
            rows = torch.arange(batch_size, device=keys.device).view(-1, 1, 1)
            lengths = (
                lengths[rows, memory.chunk_indices.clamp_min(0)]
                if lengths.shape[1]
                else memory.chunk_indices * 0
            )
        size = keys.shape[3]
        seen = (
            torch.arange(size, device=keys.device)
            < lengths.masked_fill(memory.chunk_indices < 0, 0)[..., None]
        )
        # What lies elsewhere has no weight, but 0 * NaN is NaN.
        keys, values = (x.masked_fill(~seen[..., None, None], 0) for x in (keys, values))
        seen = seen.flatten(2).flatten(0, 1)  # (B * N, K * S)
        # A last key and value of zeros is the sink; without one it is seen only where nothing else is.
        rest = torch.ones_like(seen[:, :1]) if self.sink else ~seen.any(-1, keepdim=True)
        mask = torch.cat([seen, rest], 1)[:, None, None]
        key, value = (
            F.pad(x.reshape(batch_size * blocks, slots * size, *x.shape[4:]), (0, 0, 0, 0, 0, 1)).transpose(
                1, 2
            )
            for x in (keys, values)
        )
        grouped = query.unflatten(1, (blocks, -1)).flatten(0, 1).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            grouped, key, value.to(key.dtype), attn_mask=mask, enable_gqa=key.shape[1] != grouped.shape[1]
        )
        return output.transpose(1, 2).reshape(query.shape)
