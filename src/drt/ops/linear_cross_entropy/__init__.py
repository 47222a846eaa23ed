"""The loss of a linear head, without its logits."""

from drt.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
