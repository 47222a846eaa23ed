"""Chunked cross-attention against one dense softmax over what was retrieved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.layers.chunked_cross_attention import ChunkedCrossAttention
from drt.layers.grouped_cross_attention import RetrievedMemory
from drt.ops.grouped_cross_attention import gather_chunks

BLOCK, SIZE, DIM = 3, 5, 4


def make_memory() -> RetrievedMemory:
    """Short chunks, an empty slot, a block without anything; float64."""
    indices = torch.tensor([[[-1, -1], [0, -1], [2, 1]], [[1, 0], [-1, -1], [0, 2]]])
    keys, values = torch.randn(2, 2, 3, SIZE, 2, DIM, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([[5, 2, 4], [1, 5, 3]])
    return RetrievedMemory(keys, values, lengths, indices, (indices >= 0).float())


def dense(query: Tensor, memory: RetrievedMemory, sink: bool) -> Tensor:
    output = torch.zeros_like(query)
    for row in range(query.shape[0]):
        for position in range(query.shape[1]):
            chunks = [i for i in memory.chunk_indices[row, position // BLOCK].tolist() if i >= 0]
            slots = [(i, s) for i in chunks for s in range(int(memory.lengths[row, i]))]
            for head in range(query.shape[2] if slots else 0):
                keys, values = (
                    torch.stack([table[row, i, s, head // 2] for i, s in slots])
                    for table in (memory.keys, memory.values)
                )
                scores = (keys @ query[row, position, head] / DIM**0.5).exp()
                output[row, position, head] = scores @ values / (scores.sum() + sink)
    return output


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_one_softmax_over_all_chunks(sink, gathered):
    memory = make_memory()
    query = torch.randn(2, 3 * BLOCK, 4, DIM, dtype=torch.float64).requires_grad_()
    inputs = (query, memory.keys, memory.values)
    expected = dense(query, memory, sink)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    given = memory
    if gathered:
        rows = torch.arange(2).view(-1, 1, 1)
        lengths = memory.lengths[rows, memory.chunk_indices.clamp_min(0)].masked_fill(
            memory.chunk_indices < 0, 0
        )
        keys, values = (gather_chunks(table, memory.chunk_indices) for table in (memory.keys, memory.values))
        given = memory._replace(keys=keys, values=values, lengths=lengths)
    output = ChunkedCrossAttention(16, 4, DIM, sink, 1e-5).attend(query, given)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), inputs), wanted)
