"""BM25 in tensors against BM25 in loops over counted terms."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from drt.ops.chunk_retrieval import bm25
from drt.ops.chunk_retrieval.bm25 import bm25_features, select_by_bm25

VOCAB = 30


def make_chunks(counts: tuple[int, ...], size: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids of Zipf-like frequency (rows, chunks, size) and lengths 1..size."""
    generator = torch.Generator().manual_seed(seed)
    ids = (VOCAB * torch.rand(len(counts), max(counts), size, generator=generator) ** 2).long()
    return ids, torch.randint(1, size + 1, ids.shape[:2], generator=generator)


def brute_force(chunks: list[list[int]], asking: list[int], size: int) -> list[float]:
    """The score of each chunk for the tokens that ask."""
    counters = [Counter(chunk) for chunk in chunks]
    scores = []
    for chunk, counter in zip(chunks, counters, strict=True):
        score = 0.0
        for token in asking:
            df = sum(token in other for other in counters)
            idf = math.log(1 + (len(chunks) - df + 0.5) / (df + 0.5))
            tf = counter[token]
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(chunk) / size))
        scores.append(score)
    return scores


@pytest.mark.parametrize("counts", [(1,), (7,), (40, 40), (40, 13, 1)], ids=str)
@pytest.mark.parametrize("block", [128, 5])
@pytest.mark.parametrize("pages", [False, True])
def test_each_chunk_finds_what_brute_force_finds(monkeypatch, counts, block, pages):
    monkeypatch.setattr(bm25, "QUERY_BLOCK", block)
    ids, lengths = make_chunks(counts)
    visible = torch.arange(max(counts)).expand(len(counts), -1)
    visible = torch.where(visible < torch.tensor(counts).unsqueeze(1), visible, 0)
    features = bm25_features(ids, lengths)
    held = features.split(6, 1) if pages else features
    indices, scores = select_by_bm25(features, held, visible, top_k=4)
    check(ids, lengths, visible, indices, scores)


def check(ids: Tensor, lengths: Tensor, visible: Tensor, indices: Tensor, scores: Tensor) -> None:
    offset = ids.shape[1] - visible.shape[1]
    for row in range(len(ids)):
        chunks = [
            chunk[:length] for chunk, length in zip(ids[row].tolist(), lengths[row].tolist(), strict=True)
        ]
        for query in range(visible.shape[1]):
            count = int(visible[row, query])
            expected = brute_force(chunks[:count], chunks[query + offset], ids.shape[2])
            best = sorted(expected, reverse=True)[: indices.shape[2]]
            found = [index for index in indices[row, query].tolist() if index >= 0]
            assert len(found) == len(set(found)) == min(count, indices.shape[2])
            torch.testing.assert_close(
                scores[row, query, : len(found)], torch.tensor(best), rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                torch.tensor([expected[index] for index in found]), torch.tensor(best), rtol=1e-4, atol=1e-4
            )


def test_later_chunks_ask_those_that_a_memory_holds():
    ids, lengths = make_chunks((50, 50))
    features = bm25_features(ids, lengths)
    visible = torch.arange(44, 50).expand(2, -1)
    indices, scores = select_by_bm25(features[:, 44:], features, visible, top_k=3)
    check(ids, lengths, visible, indices, scores)


def test_rounded_token_ids_are_refused():
    features = bm25_features(*make_chunks((4,)))
    with pytest.raises(ValueError, match=r"landmarks in float32, got torch\.bfloat16"):
        select_by_bm25(features, features.bfloat16(), torch.arange(4)[None], top_k=2)


def test_nothing_to_find():
    features = bm25_features(*make_chunks((1,)))
    for held in (features, [], features[:, :0]):
        indices, _ = select_by_bm25(features, held, torch.zeros(1, 1, dtype=torch.long), top_k=2)
        assert indices.tolist() == [[[-1, -1]]]
