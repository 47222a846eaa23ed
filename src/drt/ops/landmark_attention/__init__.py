"""Landmark Attention (arXiv 2305.16300): a softmax grouped by chunks, gated by the scores of their landmarks."""

from drt.ops.landmark_attention.api import grouped_softmax_attention, retrieving_attention

__all__ = ["grouped_softmax_attention", "retrieving_attention"]
