# mypy: disable-error-code="import-untyped,import-not-found"
"""The arguments of the operation as the kernels want them, and the sizes of their tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Largest tile (rows or positions) and warps, by the bytes of a row of D: wider rows need smaller tiles and more threads
# to hold them, or registers spill. benchmarks/gpu/compile_report.py shows what each costs.
TILES = {128: (64, 4), 256: (64, 8), 512: (32, 8), 1024: (16, 8)}
# Exact float32 products run outside the matrix units, on operands in registers.
TILES_FLOAT32 = {128: (32, 4), 256: (32, 8), 512: (32, 8), 1024: (16, 8)}


@dataclass(frozen=True)
class Problem:
    """Chunks by index and gathered chunks in one form.

    Slot k of block n reads the chunk at b * stride_batch + index * stride_chunk + n * stride_block + k * stride_slot:
    a table has no strides of blocks and slots, gathered chunks have none of chunks. Keys and values share their
    strides, and D is contiguous.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor
    """(B, N, K), 0 in empty slots; in gathered chunks the slot's own number, n * K + k."""
    weights: Tensor
    """(B, N, K) float32, 0 in empty slots."""
    lengths: Tensor
    """(B, N, K) int32, 0 in empty slots."""
    strides: tuple[int, ...]
    """Of batch, chunk, block, slot, position and head."""
    chunks: int
    size: int
    kv_heads: int
    block_size: int
    scale: float
    sink: bool

    @property
    def blocks(self) -> int:
        """B * N."""
        return self.indices.shape[0] * self.indices.shape[1]

    @property
    def slots(self) -> int:
        return self.indices.shape[2]

    @property
    def rows(self) -> int:
        """Rows a block and key/value head: R."""
        return self.block_size * self.query.shape[2] // self.kv_heads

    def per_row(self) -> Tensor:
        """An empty (B * N, h_kv, K, R) float32 tensor: a number for each softmax."""
        return self.query.new_empty(self.blocks, self.kv_heads, self.slots, self.rows, dtype=torch.float32)

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments that all kernels take."""
        heads, dim = self.query.shape[2:]
        block_d = _between(16, dim, 256)
        table = TILES_FLOAT32 if self.query.dtype == torch.float32 else TILES
        tile, warps = table[max(128, block_d * self.query.element_size())]
        precise = torch.get_float32_matmul_precision() == "highest"
        return {
            "HEADS": heads,
            "GROUP": heads // self.kv_heads,
            "DIM": dim,
            "SIZE": self.size,
            "BLOCK_SIZE": self.block_size,
            "SINK": self.sink,
            "PRECISION": "ieee" if precise else "tf32",
            # A matrix product wants at least 16 of everything.
            "BLOCK_R": _between(16, self.rows, tile),
            "BLOCK_D": block_d,
            "BLOCK_S": _between(16, self.size, tile),
            "num_warps": warps,
            "num_stages": 2,
        }

    def scale_log2(self) -> float:
        return self.scale * math.log2(math.e)


def prepare(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    lengths: Tensor | None,
    block_size: int,
    scale: float,
    sink: bool,
) -> Problem:
    """Bring the operator's arguments into the kernels' form; `lengths` is (B, C) with indices, else (B, N, K)."""
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    slots = weights.shape[2]
    size, kv_heads = keys.shape[-3:-1]
    if indices is None:
        chunks = weights.shape[1] * slots
        numbers = torch.arange(chunks, device=query.device, dtype=torch.int32)
        indices = numbers.view(1, -1, slots).expand(weights.shape)
        empty = torch.zeros_like(indices, dtype=torch.bool)
        strides = (keys.stride(0), 0, *keys.stride()[1:5])
    else:
        chunks = keys.shape[1]
        empty = indices < 0
        indices = indices.clamp(min=0)
        strides = (*keys.stride()[:2], 0, 0, *keys.stride()[2:4])
        if lengths is not None:
            lengths = lengths.gather(1, indices.flatten(1).long()).view(indices.shape)
    if lengths is None:
        lengths = torch.full_like(indices, size)
    lengths = lengths.masked_fill(empty, 0)
    return Problem(
        query=query.contiguous(),
        keys=keys,
        values=values,
        indices=indices.to(torch.int32).contiguous(),
        weights=weights.float().masked_fill(lengths == 0, 0).contiguous(),
        lengths=lengths.to(torch.int32).contiguous(),
        strides=strides,
        chunks=chunks,
        size=size,
        kv_heads=kv_heads,
        block_size=block_size,
        scale=scale,
        sink=sink,
    )


def _between(low: int, value: int, high: int) -> int:
    """The power of two that holds `value`, within [low, high]."""
    return min(max(low, triton.next_power_of_2(value)), high)
