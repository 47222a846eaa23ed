"""The norm of every layer."""

from __future__ import annotations

from torch import Tensor, nn

from drt.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with a gain, over the last dimension; made for the CPU.

    Args:
        hidden_size: width of the input.
        eps: added to the mean square.
    """

    eps: float

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        return rms_norm(x, self.weight, self.eps)
