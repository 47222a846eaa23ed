"""The window attention operation: checks and the choice of implementation."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from drt.ops.window_attention.impl import banded, reference

IMPLEMENTATIONS = ("reference", "banded", "flex", "triton")
HAS_TRITON = find_spec("triton") is not None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    key_start: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention of each position to the last ``window`` positions, itself included.

    Queries and keys are aligned at the right end: query i lies at key position p = i + Lk - Lq and sees the keys j
    with p - window < j <= p and j >= key_start. Time and memory are linear in the length.

    Args:
        query: (B, Lq, h, D).
        key: (B, Lk, h_kv, D), Lk >= Lq; h_kv divides h.
        value: like key.
        window: keys W that a query sees, at least 1.
        key_start: (B,) first key of each row that exists; ``None``: 0.
        alibi_slopes: (h,), bias -slope * (p - j); ``None``: no bias.
        scale: factor of the scores; default D^-0.5.
        impl: ``"reference"`` (dense), ``"banded"`` (batched products in plain torch, any device), ``"flex"``
            (FlexAttention; on the CPU dense and without gradient) or ``"triton"`` (kernels for CUDA; float32, float16,
            bfloat16, D <= 256). All but the first are linear. ``None``: ``"triton"`` for CUDA tensors that it takes,
            where Triton is installed; else ``"banded"``.

    Returns:
        (B, Lq, h, D); zeros where a query sees no key.

    Raises:
        ValueError: shapes that do not fit, a window below 1, or an unknown implementation.
        ImportError: impl is ``"triton"``, which is not installed.
    """
    _validate(query, key, value, window, key_start, alibi_slopes)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _implementation(impl, query).window_attention(
        query, key, value, window, key_start, alibi_slopes, scale
    )
    return output


def _implementation(name: str | None, query: Tensor) -> ModuleType:
    # Imported here: Triton is optional, and both are slow to import.
    if name is None and query.device.type == "cuda" and HAS_TRITON:
        from drt.ops.window_attention.impl import triton

        if triton.supports(query):
            return triton
    match name:
        case "triton":
            from drt.ops.window_attention.impl import triton

            return triton
        case "flex":
            from drt.ops.window_attention.impl import flex

            return flex
        case "banded" | None:
            return banded
        case "reference":
            return reference
    raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)} or None; got {name!r}")


def _validate(
    query: Tensor, key: Tensor, value: Tensor, window: int, key_start: Tensor | None, slopes: Tensor | None
) -> None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            f"query must be (B, Lq, h, D) and key and value (B, Lk, h_kv, D), got {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query and key must agree in B and D and have Lq <= Lk, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"key heads must divide query heads, got {key.shape[2]} and {query.shape[2]}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if key_start is not None and key_start.shape != query.shape[:1]:
        raise ValueError(f"key_start must be ({query.shape[0]},), got {tuple(key_start.shape)}")
    if slopes is not None and slopes.shape != query.shape[2:3]:
        raise ValueError(f"alibi_slopes must be ({query.shape[2]},), got {tuple(slopes.shape)}")
