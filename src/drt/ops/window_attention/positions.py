"""Positions for window attention: ALiBi slopes and rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi slope of head j of h: 2^(-8 (j + 1) / h), for any h. Returns (h,) float32."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    return torch.exp2(-8 * torch.arange(1, num_heads + 1, dtype=torch.float32) / num_heads)


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs (i, i + D / 2) of a head by angles position * theta^(-2i / D).

    Angles are computed in float64, so that they are exact to rounding at positions of 10^7 and beyond.

    Args:
        x: (B, L, h, D), D even.
        positions: (L,) or (B, L) integers.
        theta: base of the angles.

    Returns:
        Like x.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, got {dim}")
    cos, sin = torch.ops.drt.rope_angles(positions, dim, theta, x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., 1, D / 2), of positions (...)."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = positions.double().unsqueeze(-1) * frequency
    return angle.cos().to(dtype).unsqueeze(-2), angle.sin().to(dtype).unsqueeze(-2)


def _no_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, 1, dim // 2)
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


# An operator of its own: a compiled graph would compute the float64 angles anew for every row and head.
NAME = "drt::rope_angles"
torch.library.define(NAME, "(Tensor positions, int dim, float theta, ScalarType dtype) -> (Tensor, Tensor)")
torch.library.impl(NAME, "CompositeExplicitAutograd", _angles)
torch.library.register_fake(NAME, _no_angles)
