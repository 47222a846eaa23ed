"""What the recurrent layer keeps between passes: its window, its state, the block that is not yet full."""

from __future__ import annotations

from torch import Tensor

from drt.layers.recurrent_cell import OpenBlock
from drt.models.common.cache import WindowCacheLayer


class RecurrentCacheLayer(WindowCacheLayer):
    """A window layer's keys and values, and ``block``: what the recurrent cell carries on."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.block: OpenBlock | None = None

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.block is not None:
            state, keys, values, lengths = self.block
            self.block = OpenBlock(state[rows], keys[rows], values[rows], lengths[rows.cpu()])
