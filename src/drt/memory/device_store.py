"""The ``device`` tier: chunks in pages on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drt.memory.chunk_store import GatheredChunks

PAGE_BYTES = 32 * 2**20


@dataclass
class _Page:
    """A fixed number of chunk slots. Row b of the memory is row ``rows[b]`` of the tensors."""

    keys: Tensor  # (P, page_size, S, h_kv, D)
    values: Tensor
    landmarks: Tensor  # (P, page_size, H)
    lengths: Tensor  # (P, page_size)
    rows: Tensor | None = None  # None: the identity


class DeviceStore:
    """Pages of chunks on the device of what is appended.

    Growing allocates a page and copies nothing that is held.  Choosing rows (beam search, repeating a batch) is a
    change of each page's row map; only a page that is written to again is copied first.

    Args:
        page_size: chunks in a page; ``None`` takes as many as fill 32 MiB, and at least 64 and those of the first
            append, so that the pages of a long text are no more than the passes that read it.
    """

    def __init__(self, page_size: int | None = None) -> None:
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self._page_size = page_size or 0  # 0: the first append chooses
        self._pages: list[_Page] = []
        self._counts = torch.zeros(0, dtype=torch.long)

    @property
    def counts(self) -> Tensor:
        return self._counts

    def append(
        self, keys: Tensor, values: Tensor, landmarks: Tensor, lengths: Tensor, new_counts: Tensor
    ) -> None:
        batch_size, offered = keys.shape[:2]
        if len(self._counts) == 0:
            self._counts = torch.zeros(batch_size, dtype=torch.long)
        if self._page_size == 0:
            chunk_bytes = 2 * keys[0, :1].numel() * keys.element_size() * batch_size
            self._page_size = max(64, offered, PAGE_BYTES // max(chunk_bytes, 1))
        after = self._counts + new_counts
        while len(self._pages) * self._page_size < int(after.max()):
            self._pages.append(self._new_page(keys, values, landmarks, lengths))

        new = torch.arange(offered)
        slot = self._counts.unsqueeze(1) + new
        wanted = new < new_counts.unsqueeze(1)
        for number in range(int(self._counts.min()) // self._page_size, len(self._pages)):
            row, source = (wanted & (slot // self._page_size == number)).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            page = self._owned(number)
            target = (slot[row, source] % self._page_size).to(keys.device)
            row, source = row.to(keys.device), source.to(keys.device)
            for held, offer in zip(
                (page.keys, page.values, page.landmarks, page.lengths),
                (keys, values, landmarks, lengths),
                strict=True,
            ):
                held[row, target] = offer.detach()[row, source]
        self._counts = after

    def gather(self, chunk_indices: Tensor) -> GatheredChunks:
        first = self._pages[0]
        shape = chunk_indices.shape
        keys = first.keys.new_zeros(*shape, *first.keys.shape[2:])
        values = torch.zeros_like(keys)
        lengths = first.lengths.new_zeros(shape)
        page_of = torch.where(chunk_indices >= 0, chunk_indices // self._page_size, -1)
        for number in page_of.unique().tolist():
            if number < 0:
                continue
            page = self._pages[number]
            row, query, rank = (page_of == number).nonzero(as_tuple=True)
            slot = chunk_indices[row, query, rank] % self._page_size
            source = row if page.rows is None else page.rows[row]
            keys[row, query, rank] = page.keys[source, slot]
            values[row, query, rank] = page.values[source, slot]
            lengths[row, query, rank] = page.lengths[source, slot]
        return GatheredChunks(keys, values, lengths)

    def landmark_blocks(self) -> Sequence[Tensor]:
        held = int(self._counts.max()) if len(self._counts) else 0
        blocks = []
        for number, page in enumerate(self._pages):
            if number * self._page_size >= held:  # the longest row was dropped
                break
            landmarks = page.landmarks[:, : held - number * self._page_size]
            blocks.append(landmarks if page.rows is None else landmarks[page.rows])
        return blocks

    def select_rows(self, rows: Tensor) -> None:
        if len(self._counts) == 0:  # nothing was appended: the rows are not known yet
            return
        self._counts = self._counts[rows.cpu()]
        for page in self._pages:
            page.rows = (
                rows.to(page.keys.device) if page.rows is None else page.rows[rows.to(page.keys.device)]
            )

    def clear(self) -> None:
        self._pages, self._counts = [], torch.zeros(0, dtype=torch.long)

    def _new_page(self, keys: Tensor, values: Tensor, landmarks: Tensor, lengths: Tensor) -> _Page:
        def room(like: Tensor) -> Tensor:
            return like.new_empty(like.shape[0], self._page_size, *like.shape[2:])

        # Landmarks of slots not yet written are scored and masked: they must be finite.
        return _Page(room(keys), room(values), room(landmarks).zero_(), room(lengths))

    def _owned(self, number: int) -> _Page:
        """The page, after a copy where its tensors are seen through a row map."""
        page = self._pages[number]
        if page.rows is not None:
            page = self._pages[number] = _Page(
                page.keys[page.rows],
                page.values[page.rows],
                page.landmarks[page.rows],
                page.lengths[page.rows],
            )
        return page
