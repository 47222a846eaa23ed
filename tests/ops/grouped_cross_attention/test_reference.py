"""The oracle itself: against a loop over tokens, against finite differences, against closed formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.ops.grouped_cross_attention import attend_gathered_chunks, grouped_cross_attention
from drt.testing.grouped_cross_attention import (
    CASES,
    Case,
    Inputs,
    gathered_lengths,
    in_precision,
    make_inputs,
    run,
)


def token_by_token(inputs: Inputs, case: Case) -> Tensor:
    """a_i = exp(q . K_i / sqrt(D)); o_i = a_i V_i / (sum(a_i) + sink); O = sum_i w_i o_i, one query at a time."""
    query, keys, values, indices, weights, _, _ = inputs
    lengths = gathered_lengths(inputs)
    output = torch.zeros_like(query)
    batch, length, heads, dim = query.shape
    for b in range(batch):
        for t in range(length):
            block = t // case.block_size
            for j in range(heads):
                kv_head = j * case.kv_heads // heads
                for slot in range(case.slots):
                    n, chunk = int(lengths[b, block, slot]), int(indices[b, block, slot])
                    if n:
                        a = torch.exp(keys[b, chunk, :n, kv_head] @ query[b, t, j] / dim**0.5)
                        o = a @ values[b, chunk, :n, kv_head] / (a.sum() + case.sink)
                        output[b, t, j] += weights[b, block, slot] * o
    return output


@pytest.mark.parametrize("case", CASES[:4] + CASES[5:6], ids=str)
def test_equals_the_equations_token_by_token(case: Case) -> None:
    inputs = in_precision(make_inputs(case, torch.float64), torch.float64)
    torch.testing.assert_close(
        run(inputs, case, "reference").output, token_by_token(inputs, case), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str, sink: bool) -> None:
    case = Case(
        batch=1, blocks=2, block_size=2, heads=2, kv_heads=1, dim=3, size=3, slots=3, chunks=3, short=True
    )
    query, keys, values, indices, weights, _, _ = in_precision(
        make_inputs(case, torch.float64), torch.float64
    )
    lengths = torch.tensor([[3, 1, 2]])
    leaves = [x.nan_to_num().requires_grad_() for x in (query, keys, values, weights)]

    def operation(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        return grouped_cross_attention(
            query, keys, values, indices, weights, chunk_lengths=lengths, block_size=2, sink=sink, impl=impl
        )

    assert torch.autograd.gradcheck(operation, leaves)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck_of_gathered_chunks(impl: str) -> None:
    query = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    keys, values = (torch.randn(1, 2, 2, 3, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(1, 2, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[[3, 0], [2, 1]]])

    def operation(*leaves: Tensor) -> Tensor:
        return attend_gathered_chunks(*leaves, gathered_lengths=lengths, block_size=2, sink=True, impl=impl)

    assert torch.autograd.gradcheck(operation, [query, keys, values, weights])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_retrieval_score_gets_the_gradient_that_finite_differences_give(impl: str) -> None:
    """d loss / d score through the softmax over the retrieved chunks: what trains the retriever."""
    case = Case(blocks=2, chunks=6)
    query, keys, values, indices, _, _, grad_output = in_precision(
        make_inputs(case, torch.float64), torch.float64
    )
    indices = indices.clamp(min=0)
    scores = torch.randn(indices.shape, dtype=torch.float64, requires_grad=True)

    def loss(scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=-1)
        output = grouped_cross_attention(
            query, keys, values, indices, weights, block_size=case.block_size, impl=impl
        )
        return (output * grad_output).sum()

    (gradient,) = torch.autograd.grad(loss(scores), scores)
    step = 1e-6
    for place in range(scores.numel()):
        shift = torch.zeros(scores.numel(), dtype=torch.float64)
        shift[place] = step
        shift = shift.view_as(scores)
        with torch.no_grad():
            difference = (loss(scores + shift) - loss(scores - shift)) / (2 * step)
        torch.testing.assert_close(gradient.flatten()[place], difference, rtol=1e-6, atol=1e-7)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_sink_scales_each_chunk_by_the_closed_formula(impl: str) -> None:
    """With one chunk, sum(a) / (sum(a) + 1) = sigmoid(log sum exp): forward, and backward through both sides."""
    case = Case(slots=1, chunks=4, blocks=4, block_size=3)
    query, keys, values, indices, weights, _, grad_output = in_precision(
        make_inputs(case, torch.float64), torch.float64
    )
    indices = indices.clamp(min=0)
    leaves = [x.requires_grad_() for x in (query, keys, values, weights)]

    def attend(sink: bool) -> Tensor:
        return grouped_cross_attention(
            query, keys, values, indices, weights, block_size=3, sink=sink, impl=impl
        )

    rows = torch.arange(case.batch)[:, None]
    chosen = keys[rows, indices[..., 0].repeat_interleave(3, dim=1)]  # (B, L, S, h_kv, D)
    chosen = chosen.repeat_interleave(case.heads // case.kv_heads, dim=3)
    log_sum = torch.einsum("blhd,blshd->blhs", query, chosen).mul(case.dim**-0.5).logsumexp(-1)
    expected = attend(sink=False) * torch.sigmoid(log_sum).unsqueeze(-1)
    actual = attend(sink=True)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, leaves, grad_output)
    for got, want in zip(torch.autograd.grad(actual, leaves, grad_output), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(actual, attend(sink=False), rtol=1e-2)
