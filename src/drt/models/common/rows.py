"""Ragged rows: the real tokens of each row packed to slot 0, padding only behind the row's end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """Where the tokens of one pass lie. Without padding nothing moves and every field is ``None``.

    Causality makes the padding behind a row's end harmless, so no attention needs a mask for it.

    Attributes:
        lengths: (B,) tokens of each row (on the CPU).
        token_index: (B, P) flat index into the (B, L) input of each packed position; anything at padding.
        output_index: (B, L) flat index of each input column's packed position; anything at padding.
    """

    lengths: Tensor | None
    token_index: Tensor | None
    output_index: Tensor | None

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) as given to (B, P, ...) packed."""
        return tensor if self.token_index is None else tensor.flatten(0, 1)[self.token_index]

    def unpack(self, tensor: Tensor) -> Tensor:
        """(B, P, ...) packed to (B, L, ...) as given."""
        return tensor if self.output_index is None else tensor.flatten(0, 1)[self.output_index]


@torch.compiler.disable
def pack_rows(mask: Tensor | None, device: torch.device) -> PackedRows:
    """Lay out the rows of a left-padded batch.

    Args:
        mask: (B, L) bool on the CPU, as `check_inputs` returns it: zeros, then ones; ``None``: no padding.
        device: where the indices shall lie.
    """
    if mask is None:
        return PackedRows(None, None, None)
    batch_size, length = mask.shape
    lengths = mask.sum(1)
    packed = max(int(lengths.max()), 1)
    rows, pads = torch.arange(batch_size).unsqueeze(1), (length - lengths).unsqueeze(1)
    token_index = (pads + torch.arange(packed)).clamp_max(length - 1) + rows * length
    output_index = (torch.arange(length) - pads).clamp_min(0) + rows * packed
    return PackedRows(lengths, token_index.to(device), output_index.to(device))
