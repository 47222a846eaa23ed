"""The equations of grouped cross attention, written plainly: an oracle for tests, in whatever dtype it is given."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def grouped_cross_attention(
    query: torch.Tensor,
    chunk_keys: torch.Tensor,
    chunk_values: torch.Tensor,
    chunk_indices: torch.Tensor,
    chunk_weights: torch.Tensor,
    chunk_lengths: torch.Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> torch.Tensor:
    """Gather the chunks, then attend to them."""
    batch, chunks, size = chunk_keys.shape[:3]
    if chunk_lengths is None:
        chunk_lengths = torch.full((batch, chunks), size, device=query.device)
    # Index -1 reads an extra chunk of length 0 at the end of the table: an empty slot touches no real chunk.
    row = torch.arange(batch, device=query.device).view(batch, 1, 1)
    index = torch.where(chunk_indices < 0, chunks, chunk_indices).long()
    keys = pad(chunk_keys, (0, 0, 0, 0, 0, 0, 0, 1))[row, index]
    values = pad(chunk_values, (0, 0, 0, 0, 0, 0, 0, 1))[row, index]
    lengths = pad(chunk_lengths, (0, 1))[row, index]
    return attend_gathered_chunks(
        query, keys, values, chunk_weights, lengths, block_size=block_size, scale=scale, sink=sink
    )


def attend_gathered_chunks(
    query: torch.Tensor,
    gathered_keys: torch.Tensor,
    gathered_values: torch.Tensor,
    chunk_weights: torch.Tensor,
    gathered_lengths: torch.Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> torch.Tensor:
    """O_t = sum_i w_i softmax_i(scale * q_t . K_i) V_i, each chunk i with its own softmax."""
    batch, length, heads, dim = query.shape
    _, blocks, slots, size, kv_heads, _ = gathered_keys.shape
    # Axes of the einsums: b batch, n block, t query of the block, x key/value head, g query head of x, k slot.
    q = query.reshape(batch, blocks, block_size, kv_heads, heads // kv_heads, dim)
    if gathered_lengths is None:
        gathered_lengths = torch.full((batch, blocks, slots), size, device=query.device)
    valid = torch.arange(size, device=query.device) < gathered_lengths.unsqueeze(-1)
    keys = gathered_keys.masked_fill(~valid[..., None, None], 0)
    values = gathered_values.masked_fill(~valid[..., None, None], 0)

    scores = torch.einsum("bntxgd,bnksxd->bnkxtgs", q, keys) * scale
    scores = scores.masked_fill(~valid[:, :, :, None, None, None, :], -torch.inf)
    # Any shift leaves the quotient as it is; the largest term keeps exp() in range, and so does 0 with a sink.
    shift = scores.detach().amax(dim=-1, keepdim=True)
    shift = shift.clamp(min=0 if sink else torch.finfo(shift.dtype).min)
    numerator = torch.exp(scores - shift)
    denominator = numerator.sum(dim=-1, keepdim=True) + (torch.exp(-shift) if sink else 0)
    empty = (gathered_lengths == 0).view(batch, blocks, slots, 1, 1, 1, 1)
    probabilities = numerator / denominator.masked_fill(empty, 1)

    outputs = torch.einsum("bnkxtgs,bnksxd->bnktxgd", probabilities, values)
    weights = chunk_weights.masked_fill(gathered_lengths == 0, 0).to(query.dtype)
    output = torch.einsum("bnk,bnktxgd->bntxgd", weights, outputs)
    return output.reshape(batch, length, heads, dim)
