"""Inputs of grouped cross attention that reach its corners, and a run of it with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drt.ops.grouped_cross_attention import attend_gathered_chunks, gather_chunks, grouped_cross_attention


@dataclass(frozen=True)
class Case:
    """A shape of the operation. The letters are those of its docstring: L = blocks * block_size."""

    batch: int = 2
    blocks: int = 3
    block_size: int = 5
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    size: int = 4
    slots: int = 3
    chunks: int = 5
    sink: bool = False
    short: bool = False
    """Chunks of every length from 0 to S; what lies beyond a chunk's length is NaN."""
    strided: bool = False
    """No tensor is contiguous."""

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("sink", "short", "strided") if getattr(self, name))
        return (
            f"B{self.batch}N{self.blocks}T{self.block_size}h{self.heads}kv{self.kv_heads}D{self.dim}"
            f"S{self.size}K{self.slots}C{self.chunks}{flags}"
        )


CASES = (
    Case(),
    Case(sink=True, short=True),
    Case(batch=1, blocks=1, block_size=1, slots=1, size=1, chunks=1, kv_heads=4),
    Case(batch=1, blocks=15, block_size=1, kv_heads=1, size=31, slots=4, chunks=7, short=True),
    Case(batch=1, blocks=1, block_size=63, size=62, slots=2, chunks=3, sink=True, heads=2, kv_heads=1),
    Case(blocks=2, block_size=13, kv_heads=4, size=12, slots=5, chunks=4, sink=True, strided=True),
    Case(batch=1, blocks=2, block_size=50, kv_heads=1, size=33, slots=7, chunks=9, short=True, strided=True),
    Case(batch=1, blocks=1, block_size=65, kv_heads=1, size=64, slots=3, chunks=2, sink=True),
    Case(blocks=2, block_size=65, heads=2, kv_heads=2, size=64, slots=9, chunks=12, short=True, sink=True),
    Case(blocks=4, block_size=32, kv_heads=1, dim=32, size=31, slots=4, chunks=20),
    Case(blocks=4, block_size=7, kv_heads=1, dim=24, size=6, slots=6, chunks=3, sink=True),
    Case(
        batch=1, blocks=1, block_size=4, heads=2, kv_heads=1, dim=80, size=100, slots=2, chunks=3, short=True
    ),
    Case(blocks=2, block_size=3, heads=6, kv_heads=2, dim=40, size=17, slots=8, chunks=40, short=True),
)


class Inputs(NamedTuple):
    """Arguments of `grouped_cross_attention`, and the gradient that comes in."""

    query: Tensor
    chunk_keys: Tensor
    chunk_values: Tensor
    chunk_indices: Tensor
    chunk_weights: Tensor
    chunk_lengths: Tensor | None
    grad_output: Tensor


class Results(NamedTuple):
    """The output and every gradient."""

    output: Tensor
    query: Tensor
    chunk_keys: Tensor
    chunk_values: Tensor
    chunk_weights: Tensor


def make_inputs(
    case: Case, dtype: torch.dtype, *, device: str | torch.device = "cpu", seed: int = 0
) -> Inputs:
    """Draw inputs: some slots empty, some chunks twice in a block, the first block all empty, the last chunk unused."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator).to(dtype)
        return drawn.mT.contiguous().mT if case.strided else drawn

    batch, length = case.batch, case.blocks * case.block_size
    query, grad_output = (draw(batch, length, case.heads, case.dim) for _ in range(2))
    table = (batch, case.chunks, case.size, case.kv_heads, case.dim)
    keys, values = draw(*table), draw(*table)
    slots = (batch, case.blocks, case.slots)
    indices = torch.randint(0, max(1, case.chunks - 1), slots, generator=generator)
    indices.masked_fill_(torch.rand(slots, generator=generator) < 0.2, -1)
    if case.blocks > 1:
        indices[:, 0] = -1
    weights = torch.rand(slots, generator=generator)
    if case.strided:
        weights, indices = (x.mT.contiguous().mT for x in (weights, indices))
    lengths = None
    if case.short:
        lengths = torch.randint(0, case.size + 1, (batch, case.chunks), generator=generator)
        beyond = torch.arange(case.size) >= lengths.unsqueeze(-1)
        for chunks in (keys, values):
            chunks.masked_fill_(beyond[..., None, None], torch.nan)
    return _apply(Inputs(query, keys, values, indices, weights, lengths, grad_output), lambda x: x.to(device))


def run(inputs: Inputs, case: Case, impl: str, *, gathered: bool = False) -> Results:
    """Forward and backward of one implementation, from the table of chunks or from chunks gathered before."""
    query, keys, values, indices, weights, lengths, grad_output = inputs
    leaves = [x.detach().requires_grad_() for x in (query, keys, values, weights)]
    query, keys, values, weights = leaves
    if gathered:
        slot_lengths = gathered_lengths(inputs)
        output = attend_gathered_chunks(
            query,
            gather_chunks(keys.nan_to_num(), indices),
            gather_chunks(values.nan_to_num(), indices),
            weights,
            gathered_lengths=slot_lengths,
            block_size=case.block_size,
            sink=case.sink,
            impl=impl,
        )
    else:
        output = grouped_cross_attention(
            query,
            keys,
            values,
            indices,
            weights,
            chunk_lengths=lengths,
            block_size=case.block_size,
            sink=case.sink,
            impl=impl,
        )
    return Results(output.detach(), *torch.autograd.grad(output, leaves, grad_output))


def gathered_lengths(inputs: Inputs) -> Tensor:
    """(B, N, K): how many positions of each slot are valid, 0 for an empty slot."""
    _, keys, _, indices, _, lengths, _ = inputs
    batch, chunks, size = keys.shape[:3]
    if lengths is None:
        lengths = torch.full((batch, chunks), size, device=keys.device)
    chosen = lengths.gather(1, indices.clamp(min=0).flatten(1)).view_as(indices)
    return chosen.masked_fill(indices < 0, 0)


def in_precision(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in another floating dtype (the weights too)."""
    return _apply(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)


def _apply(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    lengths = None if inputs.chunk_lengths is None else change(inputs.chunk_lengths)
    query, keys, values, indices, weights, _, grad_output = inputs
    return Inputs(
        change(query),
        change(keys),
        change(values),
        change(indices),
        change(weights),
        lengths,
        change(grad_output),
    )
