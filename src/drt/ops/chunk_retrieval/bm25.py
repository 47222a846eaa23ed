"""BM25 between chunks of token ids (Robertson and Zaragoza 2009), each chunk asking those before it.

Document frequencies are those of the chunks a query may see, so nothing depends on what comes later. The length that
chunks are compared with is that of a full chunk, not a mean that would change with every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

K1 = 1.2  # how fast a repeated term stops counting
B = 0.75  # how much a chunk's length counts
QUERY_BLOCK = 128  # queries scored at a time; a table of (B, largest token id + 1, QUERY_BLOCK) is held


def bm25_features(chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
    """What scoring needs of each chunk.

    Args:
        chunk_ids: (B, N, S) token ids, a short chunk in the first slots.
        chunk_lengths: (B, N) tokens of each chunk.

    Returns:
        (B, N, 2 S) float32: token ids, -1 in slots without a token; then each term's weight
        tf (k1 + 1) / (tf + k1 (1 - b + b length / S)) at its first slot, 0 elsewhere.
    """
    size = chunk_ids.shape[-1]
    slots = torch.arange(size, device=chunk_ids.device)
    valid = slots < chunk_lengths.unsqueeze(-1)
    ids = torch.where(valid, chunk_ids, -1)
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    frequency = same.sum(-1)
    first = valid & ~(same & (slots < slots.unsqueeze(-1))).any(-1)
    length = K1 * (1 - B + B * chunk_lengths.unsqueeze(-1) / size)
    weight = torch.where(first, frequency * (K1 + 1) / (frequency + length), 0.0)
    return torch.cat([ids.float(), weight.float()], -1)


@torch.no_grad()
def select_by_bm25(
    query: Tensor, chunks: Tensor | Sequence[Tensor], visible: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """Select for each query chunk the best of those it may see: the sum over its tokens t (repeated ones count again)
    of idf(t) weight(t), idf(t) = ln(1 + (n - df + 1/2) / (df + 1/2)) over the n chunks it may see.

    Args:
        query: (B, N, 2 S) features of the query chunks.
        chunks: (B, C, 2 S) features of all chunks, or blocks (B, C_i, 2 S) of them in order.
        visible: (B, N) int, the number of leading chunks each query may see, 0 or growing by 1.
        top_k: slots K.

    Returns:
        Indices (B, N, K) int64, best first, -1 for an empty slot, and their scores (B, N, K) float32, -inf there. Of
        equal ones the later chunk is better.

    Raises:
        ValueError: features that were rounded to 16 bits, which cannot hold token ids.
    """
    held = chunks if isinstance(chunks, Tensor) else torch.cat(list(chunks), 1) if chunks else query[:, :0]
    if held.dtype != torch.float32:
        raise ValueError(f"BM25 needs a memory that keeps landmarks in float32, got {held.dtype}")
    batch_size, count = query.shape[:2]
    indices = torch.full((batch_size, count, top_k), -1, device=query.device)
    best = torch.full(indices.shape, -torch.inf, device=query.device)
    column = torch.arange(held.shape[1], device=query.device)
    slots = query.shape[-1] // 2
    largest = [int(features[..., :slots].max()) for features in (query, held) if features.numel()]
    num_terms = 1 + max([0, *largest])
    for start in range(0, count, QUERY_BLOCK) if held.numel() else ():
        part = slice(start, start + QUERY_BLOCK)
        sees = visible[:, part]
        scores = _scores(query[:, part], held, sees, num_terms)
        # Equal scores are common and must be told apart alike however the text was fed: the later chunk is better.
        rank = ((scores * 1e6).round().long() << 24) + column
        found, at = rank.masked_fill(column >= sees.unsqueeze(-1), -1).topk(min(top_k, held.shape[1]), -1)
        best[:, part, : at.shape[-1]] = scores.gather(-1, at).float().masked_fill(found < 0, -torch.inf)
        indices[:, part, : at.shape[-1]] = torch.where(found < 0, -1, at)
    return indices, best


def _scores(query: Tensor, chunks: Tensor, visible: Tensor, num_terms: int) -> Tensor:
    """(B, N, C) float64 scores of every chunk; those of chunks that a query may not see mean nothing."""
    batch_size, count = visible.shape
    ids, weights = _split(chunks)
    tokens = query[..., : query.shape[-1] // 2].long()
    seen = visible.unsqueeze(-1)
    frequency = _document_frequency(tokens.clamp_min(0), ids, weights > 0, visible, num_terms)
    idf = torch.log1p((seen - frequency + 0.5) / (frequency + 0.5)).masked_fill(tokens < 0, 0.0)
    # One row of the table a term, one column a query: a chunk's scores are a weighted sum of its terms' rows.
    table = idf.new_zeros(batch_size, num_terms, count)
    table.scatter_add_(1, tokens.clamp_min(0).transpose(1, 2), idf.transpose(1, 2).contiguous())
    row = torch.arange(batch_size, device=ids.device).view(-1, 1, 1) * num_terms
    scores = F.embedding_bag(
        (ids + row).flatten(0, 1), table.flatten(0, 1), per_sample_weights=weights.flatten(0, 1), mode="sum"
    )
    return scores.unflatten(0, (batch_size, -1)).transpose(1, 2)


def _document_frequency(
    tokens: Tensor, ids: Tensor, first: Tensor, visible: Tensor, num_terms: int
) -> Tensor:
    """(B, N, S) float64: in how many of the chunks that query n may see its tokens (B, N, S) occur."""
    batch_size, num_chunks, size = ids.shape
    number = torch.arange(num_chunks, device=ids.device)
    # What no query sees costs nothing: rows count from the first chunk that not all of their queries see.
    sees = torch.where(visible > 0, visible, visible.amax(1, keepdim=True))
    least = sees.amin(1, keepdim=True)
    before = (first & (number < least).unsqueeze(-1)).double()
    total = before.new_zeros(batch_size, num_terms).scatter_add_(1, ids.flatten(1), before.flatten(1))
    width = int((sees.amax(1, keepdim=True) - least).max())
    new = (least + torch.arange(width, device=ids.device)).clamp_max(num_chunks - 1).unsqueeze(-1)
    new = new.expand(-1, -1, size)
    occurs = total.new_zeros(batch_size, width + 1, num_terms)
    occurs[:, 1:].scatter_add_(2, ids.gather(1, new), first.gather(1, new).double())
    occurs[:, 0] = total
    row = (sees - least).unsqueeze(-1)
    rows = torch.arange(batch_size, device=ids.device).view(-1, 1, 1)
    return occurs.cumsum(1)[rows, row, tokens]


def _split(features: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, C, S) int64, 0 in empty slots, and weights (B, C, S) float64."""
    ids, weights = features.chunk(2, -1)
    return ids.long().clamp_min(0), weights.double()
