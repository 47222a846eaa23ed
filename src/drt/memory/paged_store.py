"""What all tiers share: pages of chunk slots, filled in order, and a row map for each page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drt.memory.chunk_codec import ChunkCodec, Fields
from drt.memory.chunk_store import GatheredChunks
from drt.memory.landmark_index import LandmarkIndex, LandmarkPage, PlacedPage

PAGE_BYTES = 32 * 2**20


class Page(LandmarkPage, Protocol):
    """A number of chunk slots for each of P rows. Fields are those of the store's codec, then lengths."""

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        ...

    def write(self, row: Tensor, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        """Fill slots: row and slot (m,), fields (m, ...), landmarks (m, H)."""
        ...

    def read(self, row: Tensor, slot: Tensor) -> Fields:
        """Fields (m, ...) at rows (m,) and slots (m,)."""
        ...

    def copy(self, rows: Tensor) -> Page:
        """A page of which row b is a copy of row ``rows[b]`` of this one."""
        ...


class PagedStore:
    """A `ChunkStore` over pages; a tier says how pages are made.

    Growing makes a page and copies nothing that is held. Choosing rows (beam search, repeating a batch) is a change
    of each page's row map; only a page that is written to again is copied first.

    Args:
        dtype: of held keys and values, see `ChunkCodec`.
        page_size: chunks in a page; ``None`` takes as many as fill 32 MiB, and at least 64 and those of the first
            append, so that the pages of a long text are no more than the passes that read it.
    """

    def __init__(self, dtype: str | None, page_size: int | None) -> None:
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self._codec = ChunkCodec(dtype)
        self._page_size = page_size or 0  # 0: the first append chooses
        self._pages: list[PlacedPage[Page]] = []
        self._counts = torch.zeros(0, dtype=torch.long, device="cpu")

    @property
    def counts(self) -> Tensor:
        return self._counts

    def append(
        self, keys: Tensor, values: Tensor, landmarks: Tensor, lengths: Tensor, new_counts: Tensor
    ) -> None:
        batch_size, offered = keys.shape[:2]
        if len(self._counts) == 0:
            self._counts = torch.zeros(batch_size, dtype=torch.long, device="cpu")
        fields = (*self._codec.encode(keys, values, lengths), lengths.to(keys.device))
        after = self._counts + new_counts
        self._make_room(int(after.max()), fields, landmarks)
        new = torch.arange(offered, device="cpu")
        chunk = self._counts.unsqueeze(1) + new
        wanted = new < new_counts.unsqueeze(1)
        for number, (page, start, _) in enumerate(self._pages):
            if start + page.capacity <= int(self._counts.min()):
                continue
            row, source = (wanted & (chunk >= start) & (chunk < start + page.capacity)).nonzero(as_tuple=True)
            if len(row):
                offers = [tensor[row.to(tensor.device), source.to(tensor.device)] for tensor in fields]
                at = (row.to(landmarks.device), source.to(landmarks.device))
                owned = self._owned(number)
                owned.write(row, chunk[row, source] - start, tuple(offers), landmarks.detach()[at])
        self._counts = after

    def gather(self, chunk_indices: Tensor) -> GatheredChunks:
        return self.prefetch(chunk_indices)()

    def prefetch(self, chunk_indices: Tensor) -> Callable[[], GatheredChunks]:
        shape, indices = chunk_indices.shape, chunk_indices.to(self._index_device(chunk_indices))
        starts = torch.tensor([placed.start for placed in self._pages], device=indices.device)
        page_of = torch.where(indices < 0, -1, torch.bucketize(indices.contiguous(), starts, right=True) - 1)
        nothing = indices.new_zeros(0)
        fields = [
            part.new_zeros(*shape, *part.shape[1:]) for part in self._pages[0].page.read(nothing, nothing)
        ]
        for number in page_of.unique().tolist():
            if number < 0:
                continue
            page, start, rows = self._pages[number]
            row, query, rank = (page_of == number).nonzero(as_tuple=True)
            slot = indices[row, query, rank] - start
            for field, part in zip(fields, page.read(row if rows is None else rows[row], slot), strict=True):
                field[row, query, rank] = part
        arrive = self._deliver(tuple(fields), chunk_indices.device)

        def decoded() -> GatheredChunks:
            *held, lengths = arrive()
            return GatheredChunks(*self._codec.decode(tuple(held)), lengths)

        return decoded

    def landmark_blocks(self) -> LandmarkIndex:
        return LandmarkIndex(self._pages, self._counts)

    def select_rows(self, rows: Tensor) -> None:
        if len(self._counts) == 0:  # nothing was appended: the rows are not known yet
            return
        if torch.equal(
            rows.cpu(), torch.arange(len(self._counts), device="cpu")
        ):  # every row stays what it is
            return
        self._counts = self._counts[rows.cpu()]
        for number, placed in enumerate(self._pages):
            chosen = rows if placed.rows is None else placed.rows[rows.to(placed.rows.device)]
            self._pages[number] = placed._replace(rows=chosen.to(self._index_device(rows)))

    def clear(self) -> None:
        self._pages, self._counts = [], torch.zeros(0, dtype=torch.long, device="cpu")

    def _make_room(self, count: int, fields: Fields, landmarks: Tensor) -> None:
        """Pages until a row can hold ``count`` chunks like the offered ones, (B, N, ...)."""
        if self._page_size == 0:
            batch_size, offered = landmarks.shape[:2]
            chunk_bytes = sum(field[0, :1].numel() * field.element_size() for field in fields) * batch_size
            self._page_size = max(64, offered, PAGE_BYTES // max(chunk_bytes, 1))
        held = self._pages[-1].start + self._pages[-1].page.capacity if self._pages else 0
        while held < count:
            with torch.inference_mode(False):  # else nothing could be written to it outside inference mode
                self._pages.append(PlacedPage(self._new_page(fields, landmarks), held))
            held += self._page_size

    def _new_page(self, fields: Fields, landmarks: Tensor) -> Page:
        """An empty page of ``_page_size`` slots for rows of chunks like the offered ones, (B, N, ...)."""
        raise NotImplementedError

    def _index_device(self, chunk_indices: Tensor) -> torch.device:
        """Where chunks are looked up."""
        raise NotImplementedError

    def _deliver(self, fields: Fields, device: torch.device) -> Callable[[], Sequence[Tensor]]:
        """Begin to bring gathered fields to a device; what is returned waits for them."""
        return lambda: tuple(field.to(device) for field in fields)

    def _owned(self, number: int) -> Page:
        """The page, after a copy where it is seen through a row map."""
        page, start, rows = self._pages[number]
        if rows is not None:
            with torch.inference_mode(False):  # as in `_make_room`
                page = page.copy(rows)
            self._pages[number] = PlacedPage(page, start)
        return page
