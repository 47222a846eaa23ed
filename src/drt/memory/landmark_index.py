"""The landmarks of a store as blocks, read as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor


class LandmarkPage(Protocol):
    """Landmarks of P rows of consecutive chunks."""

    def landmark_ranges(self, held: int) -> list[tuple[int, int]]:
        """Ranges of slots to read at a time, that cover [0, held)."""
        ...

    def landmarks(self, first: int, last: int) -> Tensor:
        """Landmarks (P, last - first, H) of slots [first, last)."""
        ...

    def landmarks_at(self, row: Tensor, slot: Tensor) -> Tensor:
        """Landmarks (m, H) at rows (m,) and slots (m,)."""
        ...


AnyPage = TypeVar("AnyPage", bound=LandmarkPage, covariant=True)


class PlacedPage(NamedTuple, Generic[AnyPage]):
    """A page, the number of its first chunk, and which of its rows each row of the store is (None: the same)."""

    page: AnyPage
    start: int
    rows: Tensor | None = None


class NearestLandmarks(Protocol):
    """Finds the largest dot products among the first landmarks of a memory, most of them, without reading all."""

    @property
    def num_landmarks(self) -> int:
        """It knows the landmarks [0, num_landmarks)."""
        ...

    def search(self, query: Tensor, count: int) -> Tensor:
        """At least ``count`` candidates (m, R) int64 for queries (m, H), in any order, -1 for an empty slot."""
        ...


class LandmarkIndex(Sequence[Tensor]):
    """Landmarks of B rows in order, as blocks (B, n_i, H) that are read when they are asked for.

    Searching it takes memory for one block, wherever the landmarks lie and however many there are.

    Args:
        pages: of the store, in order.
        counts: (B,) chunks that each row holds.
        index: of the first landmarks, the same for every row; ``None``: there is none.

    Attributes:
        num_landmarks: of the longest row.
        num_indexed: leading landmarks that `nearest` searches.
    """

    def __init__(
        self,
        pages: Sequence[PlacedPage[LandmarkPage]],
        counts: Tensor,
        index: NearestLandmarks | None = None,
    ) -> None:
        self._pages, self._index = pages, index
        self._batch_size = len(counts)
        self.num_indexed = 0 if index is None else index.num_landmarks
        self.num_landmarks = held = int(counts.max()) if len(counts) else 0
        ends = [placed.start for placed in pages[1:]] + [held]
        self._blocks = [
            (placed, *slots)
            for placed, end in zip(pages, ends, strict=False)
            if placed.start < held  # beyond: the longest row was dropped
            for slots in placed.page.landmark_ranges(min(end, held) - placed.start)
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        placed, first, last = self._blocks[index]
        landmarks = placed.page.landmarks(first, last)
        if placed.rows is None:
            return landmarks
        if len(landmarks) == 1:  # all rows are one: nothing is copied
            return landmarks.expand(self._batch_size, -1, -1)
        return landmarks[placed.rows]

    def blocks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """From landmark ``start`` on: blocks (B, n_i, H) in order, each with the number of its first."""
        for number, (placed, first, last) in enumerate(self._blocks):
            skipped = max(0, start - placed.start - first)
            if skipped < last - first:
                yield placed.start + first + skipped, self[number][:, skipped:]

    def nearest(self, query: Tensor, count: int) -> Tensor:
        """At least ``count`` candidates (B, N, R) for the largest dot products of queries (B, N, H) with the indexed
        landmarks, in any order, -1 for an empty slot."""
        assert self._index is not None
        found = self._index.search(query.detach().flatten(0, 1).float().cpu(), count)
        return found.to(query.device).unflatten(0, query.shape[:2])

    def read(self, chunk_indices: Tensor) -> Tensor:
        """Landmarks (B, N, K, H) of chunks (B, N, K), all of which must be held, on the device of the indices."""
        starts = torch.tensor([placed.start for placed in self._pages], device=chunk_indices.device)
        page_of = torch.bucketize(chunk_indices.contiguous(), starts, right=True) - 1
        found = None
        for number in page_of.unique().tolist():
            placed = self._pages[number]
            row, query, rank = (page_of == number).nonzero(as_tuple=True)
            slot = chunk_indices[row, query, rank] - placed.start
            # Pages of the host or of files have their rows there, wherever the indices are.
            held = row if placed.rows is None else placed.rows[row.to(placed.rows.device)]
            part = placed.page.landmarks_at(held, slot)
            if found is None:
                found = part.new_zeros(*chunk_indices.shape, part.shape[-1], device=row.device)
            found[row, query, rank] = part.to(found)
        assert found is not None
        return found
