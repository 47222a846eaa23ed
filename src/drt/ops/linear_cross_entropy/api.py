"""Cross-entropy of a linear head without the logits: (N, V) is never held, in neither pass.

Logits are made a block of rows at a time, used for the loss and for the gradients at once, and dropped: three matrix
products in all, as many as with logits, and nothing computed twice.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from drt.ops.linear_cross_entropy.impl import eager

HAS_TRITON = find_spec("triton") is not None
# Logits held at a time: about a core's cache on the CPU; enough to fill a GPU elsewhere.
BLOCK_ELEMENTS_CPU = 2**21
BLOCK_ELEMENTS = 2**28
# Logits get columns up to a multiple of this: a GPU's products are several times slower where rows are not aligned,
# and vocabularies such as GPT-2's 50,257 are odd.
COLUMNS = {"cuda": 64}


def linear_cross_entropy(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    divisor: Tensor | None = None,
) -> Tensor:
    """The mean of ``cross_entropy(states @ weight.T, targets)`` over the targets that are not ignored.

    Products are made in the autocast dtype where autocast is on, else in that of ``states``; the softmax and all sums
    are float32 (float64 for float64), and so is what comes of float16 products, whose range logits and sums leave.
    Gradient reaches ``states`` and ``weight``, once.

    Args:
        states: (N, H).
        weight: (V, H).
        targets: (N,) int64 in [0, V), or ``ignore_index``. Another one is an error, or the loss is NaN (on a GPU).
        ignore_index: targets that do not count.
        divisor: 0-d, divides the sum instead of the count of targets.

    Returns:
        0-d float32 (float64 for float64); NaN where nothing counts, as in ``cross_entropy``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"states must be (N, H) and weight (V, H); got {tuple(states.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != states.shape[:1]:
        raise ValueError(f"targets must be ({states.shape[0]},); got {tuple(targets.shape)}")
    counts = targets != ignore_index
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    wanted = torch.is_grad_enabled()
    total, _, _ = torch.ops.drt.linear_cross_entropy(
        states,
        weight,
        targets.where(counts, 0),
        counts,
        dtype,
        wanted and states.requires_grad,
        wanted and weight.requires_grad,
    )
    mean: Tensor = total / (counts.sum() if divisor is None else divisor)
    return mean


def _sum(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
    for_states: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over the rows that count, and its gradients (empty where not wanted), made while logits are at hand.

    That of the weight is float32 (float64 for float64): a sum over rows, it is rounded when it has been divided.
    """
    total, grad_states, _ = _empty(states, weight, targets, counts, dtype, for_states, False)
    total.zero_()
    kind, vocabulary = states.device.type, len(weight)
    columns = -vocabulary % COLUMNS.get(kind, 1) + vocabulary
    sums = total.new_zeros((columns, weight.shape[1]) if for_weight else 0)
    step = max(1, (BLOCK_ELEMENTS_CPU if kind == "cpu" else BLOCK_ELEMENTS) // columns)
    with torch.autocast(kind, enabled=False):
        matrix = weight.to(dtype)
        if columns > vocabulary:
            matrix = torch.cat([matrix, matrix.new_zeros(columns - vocabulary, matrix.shape[1])])
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            rows = states[part].to(dtype)
            logits = _product(rows, matrix.T)
            loss, grad = _implementation(logits).loss_and_gradient(
                logits, targets[part], counts[part], vocabulary, for_states or for_weight
            )
            total += loss
            grad = grad.to(dtype)
            if for_states:
                grad_states[part] = _product(grad, matrix)
            if for_weight:
                sums += _product(grad.T, rows)
    return total, grad_states, sums[:vocabulary]


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != torch.float16:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _implementation(logits: Tensor) -> ModuleType:
    if logits.device.type == "cuda" and HAS_TRITON:
        from drt.ops.linear_cross_entropy.impl import triton  # optional, and slow to import

        if triton.supports(logits):
            return triton
    return eager


def _empty(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
    for_states: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = states.new_empty((), dtype=torch.promote_types(states.dtype, torch.float32))
    grad_states = states.new_empty(states.shape if for_states else (0,))
    return total, grad_states, total.new_empty(weight.shape if for_weight else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, *_, ctx.for_states, ctx.for_weight = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    states, weight = ctx.saved_tensors
    scaled_states = (states * grad).to(states.dtype) if ctx.for_states else None
    scaled_weight = (weight * grad).to(ctx.weight_dtype) if ctx.for_weight else None
    return scaled_states, scaled_weight, None, None, None, None, None


# An operator of its own, so that a compiled graph cannot take its blocks apart and hold the logits after all.
NAME = "drt::linear_cross_entropy"
torch.library.define(
    NAME,
    "(Tensor states, Tensor weight, Tensor targets, Tensor counts, ScalarType dtype, bool for_states, "
    "bool for_weight) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(NAME, "CompositeExplicitAutograd", _sum)
torch.library.register_fake(NAME, _empty)
torch.library.register_autograd(NAME, _autograd, setup_context=_setup_context)
