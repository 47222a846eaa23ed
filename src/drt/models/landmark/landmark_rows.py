"""Where tokens and landmarks lie in the rows of a Landmark Attention model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drt.models.common.rows import PackedRows


class LandmarkRows(NamedTuple):
    """Slots of one pass: tokens packed to slot 0, after every ``chunk_size`` of a row's text a landmark.

    Attributes:
        held: (B,) slots of each row before this pass (on the CPU).
        lengths: (B,) new slots of each row (on the CPU).
        token_index: (B, P) flat index into packed (B, T) tokens; anything at landmarks and padding.
        is_landmark: (B, P) bool.
        token_position: (B, T) flat index of each token's own slot.
        output_index: (B, T) flat index of the slot that predicts what follows each token: of a chunk's last token
            it is the landmark.
    """

    held: Tensor
    lengths: Tensor
    token_index: Tensor
    is_landmark: Tensor
    token_position: Tensor
    output_index: Tensor


@torch.compiler.disable
def place_landmarks(
    rows: PackedRows, held: Tensor, length: int, chunk_size: int, device: torch.device
) -> LandmarkRows:
    """Lay out ``length`` packed columns of tokens; held: (B,) on the CPU, slots of each row so far."""
    slots = chunk_size + 1
    numbers = torch.arange(len(held), device="cpu").unsqueeze(1)
    read = held - held // slots  # tokens of each row so far: every chunk's landmark follows it at once
    end = read + (length if rows.lengths is None else rows.lengths)
    lengths = end + end // chunk_size - held
    width = max(int(lengths.max()), 1)
    slot = held.unsqueeze(1) + torch.arange(width, device="cpu")
    token_index = (slot - slot // slots - read.unsqueeze(1)).clamp(0, length - 1) + numbers * length
    token = read.unsqueeze(1) + torch.arange(length, device="cpu")
    closes = (token + 1) % chunk_size == 0
    position = token + token // chunk_size - held.unsqueeze(1)
    position, output = (slot.clamp_max(width - 1) + numbers * width for slot in (position, position + closes))
    return LandmarkRows(
        held=held,
        lengths=lengths,
        token_index=token_index.to(device),
        is_landmark=(slot % slots == chunk_size).to(device),
        token_position=position.to(device),
        output_index=output.to(device),
    )
