"""Nothing to compute, more window than text, and slots that hold nothing: every operation takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.ops.chunk_retrieval import retrieve_chunks, select_chunks
from drt.ops.chunk_retrieval.bm25 import bm25_features, select_by_bm25
from drt.ops.grouped_cross_attention import attend_gathered_chunks, gather_chunks, grouped_cross_attention
from drt.ops.landmark_attention import grouped_softmax_attention, retrieving_attention
from drt.ops.linear_cross_entropy import linear_cross_entropy
from drt.ops.rms_norm import rms_norm
from drt.ops.window_attention import alibi_slopes, window_attention
from drt.ops.window_attention.impl import banded
from drt.testing.largest_tensor import LargestTensor


def new(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(("batch", "length"), [(0, 6), (2, 0)])
@pytest.mark.parametrize("impl", ["reference", "banded", "flex"])
@pytest.mark.parametrize("ragged", [False, True])
def test_window_attention_of_nothing(batch: int, length: int, impl: str, ragged: bool) -> None:
    query, key, value = new(batch, length, 4, 8), new(batch, length, 2, 8), new(batch, length, 2, 8)
    start = torch.zeros(batch, dtype=torch.long) if ragged else None
    with torch.set_grad_enabled(impl != "flex"):
        output = window_attention(
            query, key, value, window=4, key_start=start, alibi_slopes=alibi_slopes(4), impl=impl
        )
    assert output.shape == query.shape
    if impl != "flex":
        output.sum().backward()


@pytest.mark.parametrize(("batch", "blocks", "chunks"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_grouped_cross_attention_of_nothing(batch: int, blocks: int, chunks: int, impl: str) -> None:
    query, weights = new(batch, blocks * 3, 4, 8), torch.rand(batch, blocks, 2, requires_grad=True)
    table = [new(batch, chunks, 5, 2, 8) for _ in range(2)]
    indices = torch.full((batch, blocks, 2), -1 if chunks == 0 else 0)
    output = grouped_cross_attention(query, *table, indices, weights, block_size=3, impl=impl)
    gathered = [gather_chunks(x, indices) for x in table]
    again = attend_gathered_chunks(query, *gathered, weights, block_size=3, impl=impl)
    (output.sum() + again.sum()).backward()
    assert query.grad is not None


@pytest.mark.parametrize(("batch", "queries", "chunks"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_retrieval_of_nothing(batch: int, queries: int, chunks: int) -> None:
    visible = torch.zeros(batch, queries, dtype=torch.long)
    query, landmarks = new(batch, queries, 8), new(batch, chunks, 8)
    for gumbel in (False, True):
        found = retrieve_chunks(query, landmarks, visible, top_k=2, scale=1.0, gumbel=gumbel)
        assert found.chunk_indices.shape == (batch, queries, 2)
        assert (found.chunk_indices == -1).all()
    assert select_chunks(query, landmarks, visible, top_k=2, scale=1.0).shape == (batch, queries, 2)
    ids, lengths = (
        torch.zeros(batch, queries, 4, dtype=torch.long),
        torch.zeros(batch, queries, dtype=torch.long),
    )
    features = bm25_features(ids, lengths)
    held = torch.zeros(batch, chunks, 8)
    assert select_by_bm25(features, held, visible, top_k=2)[0].shape == (batch, queries, 2)


@pytest.mark.parametrize(("batch", "length"), [(0, 6), (2, 0)])
def test_other_operations_on_nothing(batch: int, length: int) -> None:
    query, key = new(batch, length, 4, 8), new(batch, length, 2, 8)
    held = torch.zeros(batch, dtype=torch.long)
    settings = {"chunk_size": 3, "top_k": 2, "local_chunks": 1, "max_distance": 3, "rope_theta": 1e4}
    for output in (
        grouped_softmax_attention(query, key, key, 3),
        retrieving_attention(query, key, key, held, **settings),
        rms_norm(query, torch.ones(8, requires_grad=True), 1e-5),
    ):
        assert output.shape == query.shape
        output.sum().backward()
    none = torch.zeros(0, dtype=torch.long)
    assert linear_cross_entropy(new(0, 8), new(11, 8), none).isnan()


def test_a_window_wider_than_the_text_costs_what_the_text_costs() -> None:
    inputs = [new(2, 17, 2, 8) for _ in range(3)]
    expected = window_attention(*inputs, window=17)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    output = window_attention(*inputs, window=10**6)
    found = torch.autograd.grad(output.square().sum(), inputs)
    torch.testing.assert_close((output, *found), (expected, *wanted))
    with torch.no_grad(), LargestTensor() as largest:  # which does not look into a registered operator
        banded._forward(*inputs, None, None, 10**6, 1.0)
    assert largest.numel < 10_000


@pytest.mark.parametrize("lengths", [None, (3, 5, 5)], ids=str)
@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_an_empty_slot_spreads_nothing_of_what_it_happens_to_hold(
    lengths: tuple[int, ...] | None, gathered: bool, impl: str
) -> None:
    query, weights = new(1, 4 * 3, 4, 8), torch.rand(1, 4, 2, requires_grad=True)
    table = [torch.randn(1, 3, 5, 2, 8) for _ in range(2)]
    for chunks in table:
        chunks[:, 0] = torch.nan
        chunks.requires_grad_()
    indices = torch.tensor([[[-1, -1], [1, -1], [-1, 2], [2, 1]]])
    held = None if lengths is None else torch.tensor([lengths])
    if gathered:
        given = [gather_chunks(x, indices) for x in table]
        of_slots = (torch.full((1, 3), 5) if held is None else held)[0][indices.clamp_min(0)]
        options = {"gathered_lengths": of_slots.masked_fill(indices < 0, 0)}
        output = attend_gathered_chunks(query, *given, weights, block_size=3, impl=impl, **options)
    else:
        output = grouped_cross_attention(
            query, *table, indices, weights, block_size=3, impl=impl, chunk_lengths=held
        )
    assert output.isfinite().all()
    assert (output[:, :3] == 0).all()
    for gradient in torch.autograd.grad(output.square().sum(), [query, weights, *table]):
        assert gradient.isfinite().all()
