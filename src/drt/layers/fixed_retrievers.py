"""Retrievers that are not learned: chunks are chosen by their text, before any training.

Each makes its own retrieval keys from a chunk's token ids (`encode`), which take the place of the learned landmarks
in the chunk memory, and compares a closed chunk's key with those of the chunks before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drt.ops.chunk_retrieval import RetrievedChunks, select_chunks
from drt.ops.chunk_retrieval.bm25 import bm25_features, select_by_bm25


class ChunkEmbedder(Protocol):
    """Gives the text of chunks a vector."""

    def __call__(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        """(M, S) token ids and (M,) lengths to (M, E) float32 of length 1, on the ids' device."""
        ...


class FixedRetriever(nn.Module):
    """Base: ``encode`` gives retrieval keys, ``select`` compares them.

    Args:
        top_k: chunks selected per query.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def encode(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        """(B, N, S) token ids, a short chunk in the first slots, and (B, N) lengths to (B, N, E) float32 keys."""
        raise NotImplementedError

    def select(self, query: Tensor, keys: Tensor | Sequence[Tensor], visible: Tensor) -> Tensor:
        """Indices (B, N, K), best first, -1 for an empty slot; arguments as in `forward`."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, query: Tensor, keys: Tensor | Sequence[Tensor], visible: Tensor) -> RetrievedChunks:
        """Retrieve for each closed chunk.

        Args:
            query: (B, N, E) keys of the chunks that ask.
            keys: (B, C, E) keys of all chunks, or blocks of them in order.
            visible: (B, N) how many leading chunks each query may see.

        Returns:
            The selection; its weights are 1, or 0 for an empty slot.
        """
        indices = self.select(query, keys, visible)
        filled = (indices >= 0).float()
        return RetrievedChunks(indices, filled, filled)


class RandomRetriever(FixedRetriever):
    """Chunks at random: by the product of two random unit vectors that follow from the text of each.

    The same text gives the same choice, in one pass or many; two chunks of equal text are no more alike than others.
    """

    DIM = 32

    def encode(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        slots = torch.arange(chunk_ids.shape[-1], device=chunk_ids.device)
        ids = torch.where(slots < chunk_lengths.unsqueeze(-1), chunk_ids + 1, 0)
        text = _scramble((ids * _scramble(slots + 1)).sum(-1))
        step = torch.arange(1, 2 * self.DIM + 1, device=ids.device) * -7046029254386353131
        bits = _scramble(text.unsqueeze(-1) + step)
        even = (bits >> 40).float() / 2**23  # -1 .. 1
        return F.normalize(even.unflatten(-1, (2, self.DIM)), dim=-1).flatten(-2)

    def select(self, query: Tensor, keys: Tensor | Sequence[Tensor], visible: Tensor) -> Tensor:
        blocks = [keys] if isinstance(keys, Tensor) else keys
        asked = [block[..., : self.DIM] for block in blocks]
        return select_chunks(query[..., self.DIM :], asked, visible, top_k=self.top_k, scale=1.0)


class BM25Retriever(FixedRetriever):
    """Chunks that share rare tokens with the one that asks (see `drt.ops.chunk_retrieval.bm25`)."""

    def encode(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        return bm25_features(chunk_ids, chunk_lengths)

    def select(self, query: Tensor, keys: Tensor | Sequence[Tensor], visible: Tensor) -> Tensor:
        return select_by_bm25(query, keys, visible, top_k=self.top_k)[0]


class EmbeddingRetriever(FixedRetriever):
    """Chunks whose text an off-the-shelf model embeds near the text of the one that asks.

    ``embedder`` is set by whoever has the model's tokenizer; it is no part of the weights.
    """

    embedder: ChunkEmbedder | None = None

    def encode(self, chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
        if self.embedder is None:
            raise ValueError(
                "retriever='embedding' needs a text embedder and the model's tokenizer: "
                "call drt.models.drt.embedder.attach_embedder(model, tokenizer) first"
            )
        embedded = self.embedder(chunk_ids.flatten(0, 1), chunk_lengths.flatten())
        return embedded.unflatten(0, chunk_ids.shape[:2])

    def select(self, query: Tensor, keys: Tensor | Sequence[Tensor], visible: Tensor) -> Tensor:
        return select_chunks(query, keys, visible, top_k=self.top_k, scale=1.0)


FIXED_RETRIEVERS: dict[str, type[FixedRetriever]] = {
    "random": RandomRetriever,
    "bm25": BM25Retriever,
    "embedding": EmbeddingRetriever,
}


def _scramble(number: Tensor) -> Tensor:
    """A fixed pseudo-random int64 of each int64 (the mixing of splitmix64, products modulo 2^64)."""
    number = (number ^ _shift(number, 30)) * -4658895280553007687
    number = (number ^ _shift(number, 27)) * -7723592293110705685
    return number ^ _shift(number, 31)


def _shift(number: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros."""
    return (number >> bits) & (2 ** (64 - bits) - 1)
