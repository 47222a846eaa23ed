"""The Triton kernels on a GPU: forward and every gradient in each precision, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from drt.ops.linear_cross_entropy import linear_cross_entropy
from drt.ops.window_attention import alibi_slopes, window_attention
from drt.testing import grouped_cross_attention as gca
from drt.testing import window_attention as window
from drt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# In float32 the kernels' exponentials, which the hardware approximates to two roundings, are most of their error.
FACTORS = {torch.float32: 6.0, torch.float16: 4.0, torch.bfloat16: 4.0}
PAPER = gca.Case(
    batch=1, blocks=34, block_size=64, heads=12, kv_heads=12, dim=64, size=63, slots=8, chunks=33, sink=True
)
WIDE = [
    gca.Case(
        batch=1, blocks=4, block_size=33, heads=8, kv_heads=2, dim=dim, size=40, slots=3, chunks=9, short=True
    )
    for dim in (16, 32, 64, 96, 128, 192, 256)
]
POPULAR = gca.Case(batch=1, blocks=600, block_size=16, dim=32, size=15, slots=4, chunks=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*gca.CASES, *WIDE, PAPER, POPULAR], ids=str)
def test_grouped_cross_attention(case: gca.Case, dtype: torch.dtype) -> None:
    inputs = gca.make_inputs(case, dtype, device="cuda")
    actual, eager = gca.run(inputs, case, "triton"), gca.run(inputs, case, "reference")
    exact = gca.run(gca.in_precision(inputs, torch.float64), case, "reference")
    for name, *results in zip(gca.Results._fields, actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)
    again = gca.run(inputs, case, "triton")
    assert all(torch.equal(one, two) for one, two in zip(actual, again, strict=True)), "other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "flex"])
@pytest.mark.parametrize(
    "case",
    [
        *window.CASES,
        window.Case(length=700, window=512, heads=12, kv_heads=12, dim=64),
        window.Case(length=300, past=511, window=512, heads=4, kv_heads=2, dim=64, start=(0, 300)),
        window.Case(length=200, window=128, heads=2, kv_heads=1, dim=128),
        window.Case(length=100, window=64, heads=2, kv_heads=1, dim=256, alibi=False),
    ],
    ids=str,
)
def test_window_attention(case: window.Case, impl: str, dtype: torch.dtype) -> None:
    if impl == "flex" and (dtype != torch.bfloat16 or case.dim not in (64, 128)):
        pytest.skip("FlexAttention compiles for each shape: the shapes of models only")
    inputs = window.make_inputs(case, dtype, device="cuda")
    actual, eager = window.run(inputs, case, impl), window.run(inputs, case, "reference")
    exact = window.run([x.double() for x in inputs], case, "reference")
    for name, *results in zip(("output", "query", "key", "value"), actual, eager, exact, strict=True):
        assert_as_accurate(name, *results, factor=FACTORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(700, 50257), (300, 64), (5, 33)])
def test_linear_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 128, generator=generator).cuda().to(dtype) for n in (rows, vocabulary))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).cuda()
    targets[::3] = -100

    def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = states @ weight.T
        return cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), targets)

    results = []
    for function, exact in ((linear_cross_entropy, False), (plain, False), (plain, True)):
        leaves = [(x.double() if exact else x.clone()).requires_grad_() for x in (states, weight)]
        loss = function(*leaves, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, *values in zip(("loss", "states", "weight"), *results, strict=True):
        assert_as_accurate(name, *values, factor=FACTORS[dtype])


def _same_when_compiled(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        output = run(*leaves)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_grouped_cross_attention_in_one_compiled_graph() -> None:
    query, keys, values, indices, weights, _, _ = gca.make_inputs(PAPER, torch.bfloat16, device="cuda")

    def operation(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        return gca.grouped_cross_attention(
            query, keys, values, indices, weights, block_size=64, impl="triton"
        )

    _same_when_compiled(operation, [x.requires_grad_() for x in (query, keys, values, weights)])


def test_window_attention_in_one_compiled_graph() -> None:
    *inputs, _ = window.make_inputs(window.Case(length=300, dim=64), torch.bfloat16, device="cuda")
    slopes = alibi_slopes(4).cuda()

    def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return window_attention(query, key, value, window=100, alibi_slopes=slopes, impl="triton")

    _same_when_compiled(operation, [x.requires_grad_() for x in inputs])


def test_operator_registration() -> None:
    case = gca.Case(batch=1, blocks=2, dim=16, sink=True)
    query, keys, values, indices, weights, _, _ = gca.make_inputs(case, torch.float16, device="cuda")
    leaves = [x.requires_grad_() for x in (query, keys, values, weights)]
    arguments = (*leaves[:3], indices, leaves[3], None, case.block_size, 0.25, True)
    torch.library.opcheck(torch.ops.drt.grouped_cross_attention_triton, arguments)
    *inputs, _ = window.make_inputs(window.Case(), torch.float16, device="cuda")
    arguments = (*(x.requires_grad_() for x in inputs), None, alibi_slopes(4).cuda(), 5, 0.25)
    torch.library.opcheck(torch.ops.drt.window_attention_triton, arguments)
