# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Loss and gradient of a block of logits in one kernel: they are read twice and written once, in their own dtype.

Plain torch makes of the same some ten passes over memory in float32, which took as long as a third of a training step
of the paper's 128M model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.device_guard import on_its_device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS = 4096  # of a row, at a time
WARPS = 8


def supports(logits: Tensor) -> bool:
    """Whether the kernel takes such logits, for the choice that the operation makes."""
    return logits.device.type == "cuda" and logits.dtype in DTYPES


@triton.jit
def row_kernel(
    logits,
    targets,
    counts,
    losses,
    row_stride,
    vocabulary,
    columns,
    WANTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    counted = tl.load(counts + row) != 0
    known = (target >= 0) & (target < vocabulary)  # a wrong label must not read another row's logits
    # Before it is overwritten.
    picked = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    # The largest logit is taken off first: beside it, what is added or subtracted would lose its last digits.
    tl.store(losses + row, tl.where(counted, tl.log(total) - (picked - largest), 0.0))
    if WANTED:
        tl.debug_barrier()  # every thread has read the target's logit
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < vocabulary
            x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - largest) / total - tl.where(column == target, 1.0, 0.0)
            grad = tl.where(counted & inside, grad, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < columns)


@on_its_device
def loss_and_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, vocabulary: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `impl.eager.loss_and_gradient`; the gradient takes the logits' memory.

    A target outside the vocabulary, where a row counts, makes the loss NaN: to raise would make the host wait.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    row_kernel[(len(logits),)](
        logits,
        targets,
        counts,
        losses,
        logits.stride(0),
        vocabulary,
        logits.shape[1],
        WANTED=wanted,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return losses.sum(), logits if wanted else logits[:0]
