"""Fixed retrievers: what they choose follows from the text alone, and is what they say it is."""

from __future__ import annotations

import pytest
import torch

from drt.layers.fixed_retrievers import EmbeddingRetriever, RandomRetriever


def test_random_choices_are_even_and_repeat():
    ids = torch.randint(0, 1000, (1, 400, 7), generator=torch.Generator().manual_seed(0))
    retriever = RandomRetriever(top_k=4)
    keys = retriever.encode(ids, torch.full(ids.shape[:2], 7))
    visible = torch.full((1, 400), 400)
    indices = retriever(keys, keys, visible).chunk_indices
    counts = indices.flatten().bincount(minlength=400).float()
    assert counts.sum() == 1600
    assert counts.max() < 16  # 4 on average; a favourite would have hundreds
    assert counts.std() < 3
    chosen_by_itself = (indices[0] == torch.arange(400)[:, None]).any(-1).float().mean()
    assert chosen_by_itself < 0.05  # equal text is not preferred
    assert torch.equal(retriever(keys[:, 5:6], keys, visible[:, 5:6]).chunk_indices[:, 0], indices[:, 5])


def test_padding_of_a_short_chunk_is_no_text():
    ids = torch.tensor([[[3, 4, 5], [3, 4, 9]]])
    for lengths, same in (([[2, 2]], True), ([[3, 3]], False), ([[2, 3]], False)):
        keys = RandomRetriever(1).encode(ids, torch.tensor(lengths))
        assert torch.equal(keys[0, 0], keys[0, 1]) == same


def test_embeddings_are_compared_by_their_product():
    vectors = torch.nn.functional.normalize(torch.randn(6, 5), dim=-1)
    retriever = EmbeddingRetriever(top_k=2)
    with pytest.raises(ValueError, match=r"call drt\.models\.drt\.embedder\.attach_embedder"):
        retriever.encode(torch.zeros(1, 6, 3, dtype=torch.long), torch.full((1, 6), 3))
    retriever.embedder = lambda ids, lengths: vectors
    keys = retriever.encode(torch.zeros(1, 6, 3, dtype=torch.long), torch.full((1, 6), 3))
    found = retriever(keys, keys, torch.arange(6)[None])
    for query in range(6):
        scores = vectors[query] @ vectors[:query].T
        expected = scores.argsort(descending=True)[:2].tolist()
        assert found.chunk_indices[0, query].tolist() == expected + [-1] * (2 - len(expected))
    assert found.chunk_weights[0, :, 0].tolist() == [0, 1, 1, 1, 1, 1]
