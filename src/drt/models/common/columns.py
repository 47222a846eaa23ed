"""Which columns of input a cache has read: what an attention mask says of them must be what was read."""

from __future__ import annotations

import torch
from torch import Tensor


class ReadColumns:
    """The columns of all passes so far, row by row: tokens, or padding. Costs memory only where there is padding."""

    def __init__(self) -> None:
        self.length = 0  # columns
        self._parts: list[int | Tensor] = []  # so many columns of tokens, or (B, n) bool on the CPU

    def add(self, length: int, mask: Tensor | None) -> None:
        """Count a pass; mask: (B, length) bool on the CPU, ``None`` where no row has padding."""
        self.length += length
        if mask is not None:
            self._parts.append(mask)
        elif self._parts and isinstance(self._parts[-1], int):
            self._parts[-1] += length
        else:
            self._parts.append(length)

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes what row ``rows[b]`` was; rows: (B',) int64."""
        self._parts = [part if isinstance(part, int) else part[rows.cpu()] for part in self._parts]

    def tokens(self) -> Tensor:
        """Tokens of each row: (B,), or (1,) where all rows have as many."""
        return sum(
            (torch.tensor([part], device="cpu") if isinstance(part, int) else part.sum(1))
            for part in self._parts
        ) + torch.zeros(1, dtype=torch.long, device="cpu")

    def check(self, mask: Tensor) -> None:
        """Refuse a mask that says something else than what was read; mask: (B, length) bool on the CPU.

        Raises:
            ValueError: naming the first row and column.
        """
        read = torch.cat(
            [
                mask.new_ones(mask.shape[0], part) if isinstance(part, int) else part
                for part in (*self._parts, 0)
            ],
            1,
        )
        wrong = (mask != read).nonzero()
        if len(wrong):
            row, column = (int(x) for x in wrong[0])
            was, said = ("a token", "padding") if bool(read[row, column]) else ("padding", "a token")
            raise ValueError(
                f"attention_mask must repeat for the {self.length} columns that past_key_values holds what it was when "
                f"they were read: column {column} of row {row} was read as {was}, and the mask says {said}. What a "
                "cache has read cannot be taken out of it."
            )
