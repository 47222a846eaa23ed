"""Inputs of window attention that reach its corners, and a run of it with every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drt.ops.window_attention import alibi_slopes, window_attention


@dataclass(frozen=True)
class Case:
    """A shape of the operation, with the letters of its docstring: Lq = length, Lk = past + length."""

    length: int = 33
    past: int = 0
    window: int = 7
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    start: tuple[int, int] | None = None
    """The first key of each of the two rows that exists."""
    alibi: bool = True
    strided: bool = False
    """Memory laid out (B, h, L, D), keys and values not alike."""

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("alibi", "strided") if getattr(self, name))
        start = "" if self.start is None else f"from{self.start[0]},{self.start[1]}"
        return (
            f"L{self.length}+{self.past}W{self.window}h{self.heads}kv{self.kv_heads}D{self.dim}{start}{flags}"
        )


CASES = (
    Case(),
    Case(length=1, past=1),
    Case(length=1, past=100, window=64),
    Case(length=15, past=3, window=2, alibi=False),
    Case(length=63, window=64, kv_heads=4),
    Case(length=65, window=16, kv_heads=1, dim=24, strided=True),
    Case(length=100, past=37, window=200, dim=40, alibi=False, strided=True),
    Case(length=130, past=7, window=31, start=(137, 100)),
    Case(length=65, past=0, window=20, start=(64, 1), heads=6, kv_heads=3),
    Case(length=3, past=9, window=5, start=(0, 11), alibi=False),
)


def make_inputs(case: Case, dtype: torch.dtype, *, device: str | torch.device = "cpu") -> list[Tensor]:
    """Query, key, value and an incoming gradient, for two rows."""
    generator = torch.Generator().manual_seed(0)
    keys = case.past + case.length
    shapes = [
        (case.length, case.heads),
        (keys, case.kv_heads),
        (keys, case.kv_heads),
        (case.length, case.heads),
    ]
    inputs = [
        torch.randn(2, slots, heads, case.dim, generator=generator).to(device, dtype)
        for slots, heads in shapes
    ]
    if case.strided:
        for place in (0, 1):
            inputs[place] = inputs[place].transpose(1, 2).contiguous().transpose(1, 2)
    return inputs


def run(inputs: list[Tensor], case: Case, impl: str | None) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    device = inputs[0].device
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    output = window_attention(
        *leaves,
        window=case.window,
        key_start=None if case.start is None else torch.tensor(case.start, device=device),
        alibi_slopes=alibi_slopes(case.heads).to(device) if case.alibi else None,
        impl=impl,
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]
