"""The batched implementation against the oracle: forward and every gradient, and how it sits in torch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drt.ops.grouped_cross_attention import attend_gathered_chunks, gather_chunks, grouped_cross_attention
from drt.ops.grouped_cross_attention.impl import cpu
from drt.testing.grouped_cross_attention import CASES, Case, Inputs, Results, in_precision, make_inputs, run
from drt.testing.tolerance import assert_as_accurate


@functools.cache
def oracle(case: Case, dtype: torch.dtype) -> tuple[Inputs, Results, Results]:
    """Inputs in a precision, what an eager run in it gives, and what float64 gives."""
    inputs = make_inputs(case, dtype)
    eager = run(inputs, case, "reference")
    exact = run(in_precision(inputs, torch.float64), case, "reference")
    return inputs, eager, exact


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient(case: Case, dtype: torch.dtype, gathered: bool) -> None:
    inputs, eager, exact = oracle(case, dtype)
    actual = run(inputs, case, "cpu", gathered=gathered)
    for name, *results in zip(Results._fields, actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_stays_float64(case: Case, gathered: bool) -> None:
    inputs = in_precision(make_inputs(case, torch.float64), torch.float64)
    actual, exact = run(inputs, case, "cpu", gathered=gathered), run(inputs, case, "reference")
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", [case for case in CASES if case.blocks > 1], ids=str)
def test_what_is_not_selected_counts_exactly_nothing(case: Case, impl: str, gathered: bool) -> None:
    inputs = make_inputs(case, torch.float32)
    actual = run(inputs, case, impl, gathered=gathered)
    assert actual.output[:, : case.block_size].count_nonzero() == 0, "the first block is empty"
    assert actual.query[:, : case.block_size].count_nonzero() == 0
    assert actual.chunk_weights[inputs.chunk_indices < 0].count_nonzero() == 0
    assert actual.chunk_keys[:, -1].count_nonzero() == 0, "nobody selects the last chunk"
    assert actual.chunk_values[:, -1].count_nonzero() == 0
    if inputs.chunk_lengths is not None:
        beyond = torch.arange(case.size) >= inputs.chunk_lengths.unsqueeze(-1)
        assert actual.chunk_keys[beyond].count_nonzero() == 0
        assert actual.chunk_values[beyond].count_nonzero() == 0


def test_many_slabs_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(blocks=9, chunks=6, sink=True, short=True)
    inputs = make_inputs(case, torch.float64)
    whole = run(inputs, case, "cpu"), run(inputs, case, "cpu", gathered=True)
    monkeypatch.setattr(cpu, "SLAB_BYTES_CPU", 4 * case.block_size * case.heads * case.slots * 5 * 8)
    parts = run(inputs, case, "cpu"), run(inputs, case, "cpu", gathered=True)
    for one, many in zip(whole, parts, strict=True):
        for name, want, got in zip(Results._fields, one, many, strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("factor", [100.0, -100.0])
def test_scores_far_beyond_the_range_of_exp(factor: float, sink: bool) -> None:
    """Scores of +-20,000: the largest alone counts, or, under a sink that beats them all, nothing does."""
    case = Case(size=6, sink=sink)
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(query=inputs.query.abs() * factor, chunk_keys=inputs.chunk_keys.abs() * 10)
    exact = run(in_precision(inputs, torch.float64), case, "reference")
    for impl in ("reference", "cpu"):
        actual = run(inputs, case, impl)
        torch.testing.assert_close(actual.output.double(), exact.output, rtol=1e-2, atol=1e-2)
        assert all(bool(result.isfinite().all()) for result in actual)


def test_no_chunk_at_all_gives_zeros() -> None:
    query = torch.randn(2, 6, 4, 8, requires_grad=True)
    keys = torch.zeros(2, 0, 5, 2, 8)
    indices, weights = torch.full((2, 2, 3), -1), torch.rand(2, 2, 3)
    for impl in ("reference", "cpu"):
        output = grouped_cross_attention(query, keys, keys, indices, weights, block_size=3, impl=impl)
        assert output.shape == query.shape
        assert output.count_nonzero() == 0
        assert torch.autograd.grad(output.sum(), query)[0].count_nonzero() == 0


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_query_gives_no_output(impl: str) -> None:
    keys = torch.randn(1, 3, 5, 2, 8)
    output = grouped_cross_attention(
        torch.zeros(1, 0, 4, 8),
        keys,
        keys,
        torch.zeros(1, 0, 3, dtype=torch.long),
        torch.zeros(1, 0, 3),
        block_size=6,
        impl=impl,
    )
    assert output.shape == (1, 0, 4, 8)


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
def test_empty_slots_at_the_end_of_a_block_are_left_out(gathered: bool) -> None:
    indices = torch.tensor([[[-1, -1, -1], [4, -1, -1]], [[2, -1, 1], [0, 3, -1]]])
    lengths = torch.where(indices >= 0, 5, 0) if gathered else torch.full(indices.shape, 5)
    given = None if gathered else indices
    assert cpu._filled_slots(torch.zeros(indices.shape), given, lengths) == [0, 1, 3, 2]


def test_gathered_chunks_of_any_memory_layout() -> None:
    case = Case()
    query, keys, values, indices, weights, _, _ = make_inputs(case, torch.float32)
    ours = [gather_chunks(x, indices.clamp(min=0)) for x in (keys, values)]
    results = []
    for gathered in (ours, [x.contiguous() for x in ours], [x.mT.contiguous().mT for x in ours]):
        leaves = [x.detach().requires_grad_() for x in gathered]
        output = attend_gathered_chunks(query, *leaves, weights, block_size=case.block_size, impl="cpu")
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_gather_chunks_copies_the_selected_and_adds_their_gradients() -> None:
    keys = torch.randn(2, 4, 3, 2, 5, requires_grad=True)
    indices = torch.tensor([[[0, 3], [3, 3]], [[1, 1], [2, 0]]])
    gathered = gather_chunks(keys, indices)
    expected = keys[torch.arange(2)[:, None, None], indices]
    assert torch.equal(gathered, expected)
    incoming = torch.randn_like(gathered)
    torch.testing.assert_close(
        torch.autograd.grad(gathered, keys, incoming), torch.autograd.grad(expected, keys, incoming)
    )
    assert gather_chunks(keys[:, :0], torch.full((2, 2, 3), -1)).count_nonzero() == 0


def operation(*tensors: Tensor, block_size: int = 5) -> Tensor:
    query, keys, values, weights, indices = tensors
    return grouped_cross_attention(query, keys, values, indices, weights, block_size=block_size, impl="cpu")


def leaves_of(inputs: Inputs) -> list[Tensor]:
    floating = [inputs.query, inputs.chunk_keys, inputs.chunk_values, inputs.chunk_weights]
    return [x.detach().requires_grad_() for x in floating] + [inputs.chunk_indices]


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_compiled_and_checkpointed_runs_equal_the_eager_run(how: str) -> None:
    tensors = leaves_of(make_inputs(Case(), torch.float32))
    if how == "compile":
        other = torch.compile(operation, fullgraph=True, backend="aot_eager")
    else:
        other = functools.partial(checkpoint, operation, use_reentrant=False)
    results = []
    for function in (operation, other):
        output = function(*tensors)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors[:4])])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
def test_operator_registration(gathered: bool) -> None:
    case = Case(sink=True)
    query, keys, values, indices, weights, _, _ = make_inputs(case, torch.bfloat16)
    lengths = torch.full(indices.shape, 2)
    if gathered:
        keys, values, indices = gather_chunks(keys, indices), gather_chunks(values, indices), None
    tensors = [x.detach().requires_grad_() for x in (query, keys, values, weights)]
    query, keys, values, weights = tensors
    arguments = (query, keys, values, indices, weights, lengths, case.block_size, 0.25, True)
    torch.library.opcheck(torch.ops.drt.grouped_cross_attention_eager, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (query, *arguments)]
    torch.library.opcheck(torch.ops.drt.grouped_cross_attention_eager_backward, tuple(detached))


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = leaves_of(make_inputs(Case(), torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = operation(*tensors)
    assert torch.equal(inside, operation(*tensors))


def test_weights_keep_their_own_precision() -> None:
    inputs = make_inputs(Case(), torch.bfloat16)
    assert inputs.chunk_weights.dtype == torch.float32
    assert run(inputs, Case(), "cpu").chunk_weights.dtype == torch.float32
