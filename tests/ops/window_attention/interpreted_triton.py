"""The window kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of its own.

The interpreter's bfloat16 products are wrong, so float32 and float16 stand for the rest here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drt.ops.window_attention import alibi_slopes, window_attention
from drt.testing.tolerance import assert_as_accurate
from drt.testing.window_attention import CASES, Case, make_inputs, run


@pytest.fixture(autouse=True)
def _poison_new_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a row that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    actual, eager = run(inputs, case, "triton"), run(inputs, case, "reference")
    exact = run([x.double() for x in inputs], case, "reference")
    for name, *results in zip(("output", "query", "key", "value"), actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)


def test_a_window_of_one_gives_the_value() -> None:
    query, key, value, _ = make_inputs(Case(length=20, kv_heads=4), torch.float32)
    assert torch.equal(window_attention(query, key, value, window=1, impl="triton"), value)


def test_what_does_not_exist_is_never_read() -> None:
    case = Case(length=20, past=50, window=30, start=(40, 0))
    inputs = make_inputs(case, torch.float32)
    plain = run(inputs, case, "triton")
    for tensor in inputs[1:3]:
        tensor[0, :40] = torch.nan
    assert all(torch.equal(one, two) for one, two in zip(run(inputs, case, "triton"), plain, strict=True))


def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return window_attention(query, key, value, window=5, alibi_slopes=alibi_slopes(4), impl="triton")


def test_compiled_run_equals_the_eager_run() -> None:
    *inputs, grad_output = make_inputs(Case(length=9), torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for function in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")):
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, grad_output)])
    torch.testing.assert_close(results[1], results[0])


def test_operator_registration() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what it allocates
    *inputs, grad_output = make_inputs(Case(length=9), torch.float32)
    arguments = (
        *(x.requires_grad_() for x in inputs),
        torch.zeros(2, dtype=torch.long),
        alibi_slopes(4),
        5,
        0.25,
    )
    torch.library.opcheck(torch.ops.drt.window_attention_triton, arguments)
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    saved = torch.ops.drt.window_attention_triton(*arguments)
    torch.library.opcheck(torch.ops.drt.window_attention_triton_backward, (grad_output, *saved, *arguments))


def test_no_query() -> None:
    *inputs, grad_output = make_inputs(Case(length=0, past=4), torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    output = operation(*leaves)
    assert output.shape == (2, 0, 4, 16)
    gradients = torch.autograd.grad(output, leaves, grad_output)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"takes torch.float32, .* D up to 256; got torch.float64, D=16"):
        operation(*(x.double() for x in make_inputs(Case(), torch.float32)[:3]))
