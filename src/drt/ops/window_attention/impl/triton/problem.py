# mypy: disable-error-code="import-untyped,import-not-found"
"""The arguments of the operation as the kernels want them, and the sizes of their tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Queries and keys of a tile, and warps, by the bytes of a row of D: wider rows need smaller tiles, or registers spill.
TILES = {128: (128, 64, 4), 256: (128, 64, 8), 512: (64, 32, 8), 1024: (32, 16, 8)}
BACKWARD_TILES = {128: (64, 64, 4), 256: (64, 64, 8), 512: (32, 32, 8), 1024: (16, 16, 8)}
# Exact float32 products run outside the matrix units, on operands in registers.
TILES_FLOAT32 = {128: (32, 32, 4), 256: (32, 32, 8), 512: (32, 32, 8), 1024: (16, 16, 8)}


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values (B, L, heads, D) with D contiguous; keys and values share their strides."""

    query: Tensor
    keys: Tensor
    values: Tensor
    key_start: Tensor | None
    slopes: Tensor | None
    """(h,) float32, in units of log 2."""
    window: int
    scale: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def length(self) -> int:
        return self.query.shape[1]

    @property
    def key_length(self) -> int:
        return self.keys.shape[1]

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, position and head: the query's, then the keys'."""
        return (*self.query.stride()[:3], *self.keys.stride()[:3])

    def scale_log2(self) -> float:
        return self.scale * math.log2(math.e)

    def constants(self, *, backward: bool = False) -> dict[str, Any]:
        """The compile-time arguments that all kernels take."""
        dim = self.query.shape[3]
        block_d = max(16, triton.next_power_of_2(dim))
        table = BACKWARD_TILES if backward else TILES
        if self.query.dtype == torch.float32:
            table = TILES_FLOAT32
        block_q, block_k, warps = table[max(128, block_d * self.query.element_size())]
        precise = torch.get_float32_matmul_precision() == "highest"
        return {
            "HEADS": self.heads,
            "GROUP": self.heads // self.keys.shape[2],
            "DIM": dim,
            "WINDOW": self.window,
            "STARTS": self.key_start is not None,
            "ALIBI": self.slopes is not None,
            "PRECISION": "ieee" if precise else "tf32",
            "BLOCK_Q": min(block_q, max(16, triton.next_power_of_2(self.length))),
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
            "num_warps": warps,
            "num_stages": 2,
        }


def prepare(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_start: Tensor | None,
    slopes: Tensor | None,
    window: int,
    scale: float,
) -> Problem:
    """Bring the operator's arguments into the kernels' form."""
    if query.stride(3) != 1:
        query = query.contiguous()
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    if slopes is not None:
        slopes = (slopes.float() * math.log2(math.e)).contiguous()
    if key_start is not None:
        key_start = key_start.contiguous()
    return Problem(query, keys, values, key_start, slopes, window, scale)
