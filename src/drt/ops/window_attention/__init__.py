"""Causal attention over a sliding window, linear in the length, with ALiBi or rotary positions."""

from drt.ops.window_attention.api import window_attention
from drt.ops.window_attention.positions import alibi_slopes, apply_rope

__all__ = ["alibi_slopes", "apply_rope", "window_attention"]
