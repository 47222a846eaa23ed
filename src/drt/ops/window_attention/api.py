"""The window attention operation: checks and the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from drt.ops.window_attention.impl import banded, reference

_IMPLEMENTATIONS = {"reference": reference.window_attention, "banded": banded.window_attention}


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
        impl: ``"reference"`` (dense) or ``"banded"`` (linear); ``None`` takes ``"banded"``.

    Returns:
        (B, Lq, h, D); zeros where a query sees no key.

    Raises:
        ValueError: shapes that do not fit, a window below 1, or an unknown implementation.
    """
    _validate(query, key, value, window, key_start, alibi_slopes)
    name = "banded" if impl is None else impl
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {sorted(_IMPLEMENTATIONS)} or None, got {impl!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _IMPLEMENTATIONS[name](query, key, value, window, key_start, alibi_slopes, scale)


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
