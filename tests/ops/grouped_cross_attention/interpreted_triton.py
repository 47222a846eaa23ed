"""The Triton kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of its own.

The interpreter's bfloat16 products are wrong, so float32 and float16 stand for the rest here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drt.ops.grouped_cross_attention import gather_chunks, grouped_cross_attention
from drt.ops.grouped_cross_attention.impl import triton as kernels
from drt.ops.grouped_cross_attention.impl.triton.backward import inverse_index, share_out
from drt.ops.grouped_cross_attention.impl.triton.problem import prepare
from drt.testing.grouped_cross_attention import CASES, Case, Results, in_precision, make_inputs, run
from drt.testing.tolerance import assert_as_accurate


@pytest.fixture(autouse=True)
def _poison_new_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a row that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype, *, gathered: bool = False) -> None:
    inputs = make_inputs(case, dtype)
    actual = run(inputs, case, "triton", gathered=gathered)
    eager = run(inputs, case, "reference")
    exact = run(in_precision(inputs, torch.float64), case, "reference")
    for name, *results in zip(Results._fields, actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # All these shapes are small enough for the decode kernel; this is the test of the other one.
    monkeypatch.setattr(kernels, "DECODE_PROGRAMS", 0)
    check(case, torch.float32)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[6]], ids=str)
def test_decode_in_float16(case: Case) -> None:
    check(case, torch.float16)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_gathered_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DECODE_PROGRAMS", 0)
    check(case, torch.float16, gathered=True)


def test_gathered_chunks_of_any_memory_layout() -> None:
    case = CASES[4]
    inputs = make_inputs(case, torch.float32)
    query, keys, values, indices, weights, _, _ = inputs
    results = []
    for order in (lambda x: x, lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        gathered = [order(gather_chunks(x, indices.clamp(min=0))) for x in (keys, values)]
        arguments = (query, *gathered, None, weights, None, case.block_size, 0.25, True)
        results.append(torch.ops.drt.grouped_cross_attention_triton(*arguments)[0])
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_what_is_not_selected_counts_exactly_nothing() -> None:
    case = CASES[1]
    inputs = make_inputs(case, torch.float32)
    actual = run(inputs, case, "triton")
    assert actual.output[:, : case.block_size].count_nonzero() == 0
    assert actual.query[:, : case.block_size].count_nonzero() == 0
    assert actual.chunk_weights[inputs.chunk_indices < 0].count_nonzero() == 0
    assert inputs.chunk_lengths is not None
    beyond = torch.arange(case.size) >= inputs.chunk_lengths.unsqueeze(-1)
    for gradient in (actual.chunk_keys, actual.chunk_values):
        assert gradient[:, -1].count_nonzero() == 0, "nobody selects the last chunk"
        assert gradient[beyond].count_nonzero() == 0


def test_inverse_index_lists_every_filled_slot_once_in_order() -> None:
    indices = torch.tensor([[[2, -1], [0, 2], [2, 2]], [[-1, -1], [-1, -1], [1, 0]]])
    keys = torch.zeros(2, 4, 3, 1, 8)
    problem = prepare(torch.zeros(2, 3, 1, 8), keys, keys, indices, torch.ones(2, 3, 2), None, 1, 1.0, False)
    users, first = inverse_index(problem)
    found = [[users[b, first[b, c] : first[b, c + 1]].tolist() for c in range(4)] for b in range(2)]
    assert found == [[[2], [], [0, 3, 4, 5], []], [[5], [4], [], []]]


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's function has the name of its module, so plain attribute access would give that.
    monkeypatch.setattr(sys.modules[inverse_index.__module__], "SHARE", 2)


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], Case(blocks=7, chunks=2, slots=3)], ids=str)
def test_chunks_shared_out_over_several_programs(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.usefixtures("small_shares")
def test_shares_cover_every_slot_once() -> None:
    first_user = torch.tensor([[0, 0, 1, 6, 8], [0, 8, 8, 8, 8]])
    shares = share_out(first_user, 8)
    assert shares.chunk.tolist() == [[0, 1, 2, 2, 2, 3, 4, 4], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert shares.first.tolist() == [[0, 1, 2, 5, 6], [0, 4, 5, 6, 7]]
    assert shares.first_part.tolist() == [[0, 0, 0, 3, 3], [0, 4, 4, 4, 4]]
    assert shares.num_parts == 8


def test_chunk_gradients_have_the_same_bits_every_run() -> None:
    case = Case(batch=1, chunks=2)
    inputs = make_inputs(case, torch.float16)
    first, second = run(inputs, case, "triton"), run(inputs, case, "triton")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("factor", [100.0, -100.0])
@pytest.mark.parametrize("sink", [False, True])
def test_scores_far_beyond_the_range_of_exp(factor: float, sink: bool) -> None:
    case = Case(batch=1, blocks=2, size=6, sink=sink)
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(query=inputs.query.abs() * factor, chunk_keys=inputs.chunk_keys.abs() * 10)
    exact = run(in_precision(inputs, torch.float64), case, "reference")
    actual = run(inputs, case, "triton")
    torch.testing.assert_close(actual.output.double(), exact.output, rtol=1e-2, atol=1e-2)
    assert all(bool(result.isfinite().all()) for result in actual)


def test_no_chunk_and_no_query() -> None:
    query, keys = torch.randn(1, 6, 4, 8), torch.zeros(1, 0, 5, 2, 8)
    arguments = (keys, keys, torch.full((1, 2, 3), -1), torch.rand(1, 2, 3))
    assert grouped_cross_attention(query, *arguments, block_size=3, impl="triton").count_nonzero() == 0
    keys = torch.randn(1, 3, 5, 2, 8, requires_grad=True)
    nothing = (torch.zeros(1, 0, 3, dtype=torch.long), torch.zeros(1, 0, 3))
    output = grouped_cross_attention(query[:, :0], keys, keys, *nothing, block_size=3, impl="triton")
    assert output.shape == (1, 0, 4, 8)
    assert torch.autograd.grad(output.sum(), keys)[0].count_nonzero() == 0


def operation(*tensors: Tensor) -> Tensor:
    query, keys, values, weights, indices = tensors
    return grouped_cross_attention(query, keys, values, indices, weights, block_size=5, impl="triton")


def test_compiled_run_equals_the_eager_run() -> None:
    query, keys, values, indices, weights, _, _ = make_inputs(Case(batch=1), torch.float32)
    leaves = [x.requires_grad_() for x in (query, keys, values, weights)]
    results = []
    for function in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")):
        output = function(*leaves, indices)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("gathered", [False, True], ids=["indices", "gathered"])
def test_operator_registration(gathered: bool) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what it allocates
    case = Case(batch=1, blocks=1, kv_heads=1, sink=True, slots=1)
    query, keys, values, indices, weights, _, _ = make_inputs(case, torch.float16)
    lengths = torch.full((1, case.chunks), 2)
    indices = indices.clamp(min=0)
    if gathered:
        keys, values, lengths = (*(gather_chunks(x, indices) for x in (keys, values)), indices)
        indices = None
    query, keys, values, weights = (x.detach().requires_grad_() for x in (query, keys, values, weights))
    arguments = (query, keys, values, indices, weights, lengths, case.block_size, 0.25, True)
    torch.library.opcheck(torch.ops.drt.grouped_cross_attention_triton, arguments)
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    _, log_sums = torch.ops.drt.grouped_cross_attention_triton(*arguments)
    backward = torch.ops.drt.grouped_cross_attention_triton_backward
    torch.library.opcheck(backward, (arguments[0], log_sums, *arguments))


def test_what_the_kernels_do_not_take() -> None:
    def attend(query: Tensor) -> Tensor:
        keys = query.new_zeros(1, 2, 3, 1, query.shape[-1])
        indices, weights = torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1)
        return grouped_cross_attention(query, keys, keys, indices, weights, block_size=1, impl="triton")

    with pytest.raises(ValueError, match=r"computes in torch.float32, torch.float16, .*; got torch.float64"):
        attend(torch.zeros(1, 1, 1, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="head dimensions up to 256; got 272"):
        attend(torch.zeros(1, 1, 1, 272))
