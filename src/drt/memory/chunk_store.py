"""The protocol of a chunk memory: append chunks, gather them by index, hand out their landmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from drt.memory.landmark_index import LandmarkIndex


class GatheredChunks(NamedTuple):
    """Chunks read by index.

    Attributes:
        keys: (B, N, K, S, h_kv, D).
        values: (B, N, K, S, h_kv, D).
        lengths: (B, N, K) tokens in each chunk, 0 for an empty slot.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


class ChunkStore(Protocol):
    """A memory of chunks for B independent rows, each with its own count."""

    @property
    def counts(self) -> Tensor:
        """(B,) int64 on the CPU: chunks held by each row."""
        ...

    def append(
        self, keys: Tensor, values: Tensor, landmarks: Tensor, lengths: Tensor, new_counts: Tensor
    ) -> None:
        """Append to row b its first ``new_counts[b]`` of N offered chunks.

        Args:
            keys: (B, N, S, h_kv, D).
            values: (B, N, S, h_kv, D).
            landmarks: (B, N, H) retrieval keys.
            lengths: (B, N) tokens in each chunk.
            new_counts: (B,) int64 on the CPU, each at most N.
        """
        ...

    def gather(self, chunk_indices: Tensor) -> GatheredChunks:
        """Read chunks by index. chunk_indices: (B, N, K), -1 for an empty slot (its content is zeros)."""
        ...

    def prefetch(self, chunk_indices: Tensor) -> Callable[[], GatheredChunks]:
        """Begin to read chunks; what is returned waits for them and gives what `gather` does. Call it once."""
        ...

    def landmark_blocks(self) -> LandmarkIndex:
        """Landmarks in order as blocks (B, n_i, H), read as they are asked for; slots past a row's count are finite."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes what row ``rows[b]`` was; rows: (B',) int64. Used by beam search and to repeat a batch."""
        ...

    def clear(self) -> None:
        """Forget every chunk and every row."""
        ...
