"""Cross-entropy without logits, against torch's with them: value, gradients, precision, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from drt.ops.linear_cross_entropy import api, linear_cross_entropy
from drt.testing.largest_tensor import LargestTensor
from drt.testing.tolerance import assert_as_accurate


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BLOCK_ELEMENTS_CPU", 7 * 50)


def draw(dtype: torch.dtype, rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """States, weight and targets, a third of them ignored."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (rows, 50))
    targets = torch.randint(0, 50, (rows,), generator=generator)
    targets[::3] = -100
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = states @ weight.T
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def run(function, states: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    loss = function(states, weight, targets)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (states, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 7, 40])
@pytest.mark.parametrize("columns", [1, 64])
def test_value_and_gradients(
    dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api.COLUMNS, "cpu", columns)
    inputs = draw(dtype, rows)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs[:2]]
    exact = run(plain, *exact_inputs, inputs[2])
    actual, eager = run(linear_cross_entropy, *inputs), run(plain, *inputs)
    for name, *results in zip(("loss", "states", "weight"), actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize("scales", [(1, 1), (150, 150), (60, 0)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_is_finite_where_float32_is(scales: tuple[int, int], autocast: bool) -> None:
    """At 150 logits leave its range; at 60 the weight's gradient does, before it is divided by the rows."""
    generator = torch.Generator().manual_seed(0)
    states = scales[0] * torch.rand(3000, 16, generator=generator).half()
    weight = scales[1] * (torch.randn(50, 16, generator=generator) + 1).half()
    targets = torch.zeros(3000, dtype=torch.long)
    states, weight = (x.requires_grad_() for x in (states, weight))
    exact = run(plain, *(x.detach().double().requires_grad_() for x in (states, weight)), targets)
    if autocast:
        states, weight = (x.detach().float().requires_grad_() for x in (states, weight))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = run(linear_cross_entropy, states, weight, targets)
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


def test_finite_differences() -> None:
    torch.testing.assert_close(
        run(linear_cross_entropy, *draw(torch.float64)), run(plain, *draw(torch.float64))
    )
    states, weight, targets = draw(torch.float64, 9)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, targets), (states, weight))


def test_a_divisor_of_its_own() -> None:
    inputs = draw(torch.float64)
    counted = (inputs[2] != -100).sum()
    halved = linear_cross_entropy(*inputs, divisor=2 * counted)
    torch.testing.assert_close(halved, plain(*inputs) / 2)


def test_nothing_that_counts_is_nan_as_in_torch() -> None:
    states, weight, targets = draw(torch.float32)
    assert linear_cross_entropy(states, weight, torch.full_like(targets, -100)).isnan()


def test_only_what_is_wanted_gets_a_gradient() -> None:
    states, weight, targets = draw(torch.float32)
    wanted = run(plain, states, weight, targets)
    assert not linear_cross_entropy(states.detach(), weight.detach(), targets).requires_grad
    (grad,) = torch.autograd.grad(3 * linear_cross_entropy(states, weight.detach(), targets), states)
    torch.testing.assert_close(grad, wanted[1])


def test_autocast_multiplies_in_its_dtype() -> None:
    states, weight, targets = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(linear_cross_entropy, states, weight, targets)
        eager = run(plain, states, weight, targets)
    exact = run(plain, *(x.detach().double().requires_grad_() for x in (states, weight)), targets)
    assert (actual[0] - exact[0]).abs() > 1e-6, "not float32 products"
    for name, *results in zip(("loss", "states", "weight"), actual, eager, exact, strict=True):
        assert_as_accurate(name, *results)


def test_compiled() -> None:
    inputs = draw(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, *inputs), run(linear_cross_entropy, *inputs))


def test_operator_registration() -> None:
    states, weight, targets = draw(torch.float32)
    arguments = (states, weight, targets.clamp(min=0), targets >= 0, torch.float32, True, True)
    torch.library.opcheck(torch.ops.drt.linear_cross_entropy, arguments)


def test_logits_are_never_held() -> None:
    states, weight, targets = draw(torch.float32, 300)
    with LargestTensor() as largest:
        linear_cross_entropy(states, weight, targets).backward()
    assert largest.numel == 300 * 16 < 300 * 50


def test_what_does_not_fit_is_refused() -> None:
    states, weight, targets = draw(torch.float32)
    with pytest.raises(ValueError, match=r"weight \(V, H\); got \(40, 16\) and \(50, 15\)"):
        linear_cross_entropy(states, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets must be \(40,\); got \(39,\)"):
        linear_cross_entropy(states, weight, targets[1:])
