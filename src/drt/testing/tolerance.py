"""How wrong a result may be: as wrong as an eager run of the same precision, times a small factor."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 4.0
) -> None:
    """Fail unless `actual` is as near to `exact` as a plain run in its precision is.

    The bound is derived, not tuned: `factor` times the error of `eager`, and never less than one rounding of the
    result, which no implementation can avoid. It holds for the largest error and for the root mean square; the
    second catches what a few large entries would hide in the first.

    Args:
        name: what is compared, for the message.
        actual: the result on trial.
        eager: the same quantity from plain operations in `actual`'s dtype.
        exact: the same quantity in float64.
        factor: how many times the eager error is allowed: another order of sums and a rounding more of the scores may
            double it, and the eager error is itself one draw, which may be lucky by as much.

    Raises:
        AssertionError: a shape or dtype differs, a value is not finite, or the error is too large.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps
    actual, eager, exact = (x.detach().to("cpu", torch.float64) for x in (actual, eager, exact))
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    for measure, size in (("largest", _largest), ("root mean square", _root_mean_square)):
        error = size(actual - exact)
        allowed = max(factor * size(eager - exact), rounding * size(exact))
        assert error <= allowed, f"{name}: {measure} error {error:.3g}, allowed {allowed:.3g}"


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
