"""Training rows from a corpus: which tokens each row of each step holds follows from its number and the seed alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drt.data.corpus import Corpus
from drt.errors import DRTError


class WindowSampler:
    """Cuts a corpus into windows of one length and gives them in a random order, each once an epoch.

    Every epoch shifts the cuts and shuffles anew. A window is found from its number alone, so a run resumes exactly
    without any state, and any number of ranks sees the same windows.

    Args:
        corpus: to read.
        length: tokens L of a window.
        seed: of the order.
        inside_documents: no window holds tokens of two documents: what is left of a document after its last whole
            window is not used in that epoch, and documents shorter than L are never used. False: documents follow
            one another in one stream, and a window may hold the end of one and the beginning of the next.

    Raises:
        DRTError: the corpus (or, inside documents, every document) is shorter than a window.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, *, inside_documents: bool) -> None:
        self.corpus = corpus
        self.length = length
        self._seed = seed
        starts, lengths = corpus.document_starts[:-1], corpus.document_lengths
        if inside_documents:
            used = lengths >= length
            self._starts, self._spans = starts[used], lengths[used]
        else:
            self._starts, self._spans = np.zeros(1, np.int64), np.array([corpus.num_tokens])
        self._counts = self._spans // length
        self.windows_per_epoch = int(self._counts.sum())
        if self.windows_per_epoch == 0:
            what = "its longest document has" if inside_documents else "it has"
            found = int(lengths.max(initial=0)) if inside_documents else corpus.num_tokens
            raise DRTError(
                f"{corpus.manifest.folder}, {corpus.split}: shorter than one sequence: expected {length} tokens, "
                f"{what} {found}"
            )
        self._epoch = -1
        self._windows = np.empty(0, np.int64)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """(L,) token ids of a window; numbers count from 0 over all epochs."""
        epoch, place = divmod(number, self.windows_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._order(epoch)
        start = int(self._windows[place])
        return self.corpus.tokens(start, start + self.length).astype(np.int64)

    def rows(self, step: int, rows: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """(rows / world_size, L) token ids: the share of one rank in the `rows` windows of a step.

        Args:
            step: counts from 0.
            rows: windows of the step over all ranks; `world_size` divides it.
            rank: 0..world_size - 1.
            world_size: number of ranks.
        """
        share, rest = divmod(rows, world_size)
        if rest:
            raise ValueError(f"rows: expected a multiple of the {world_size} ranks, got {rows}")
        first = step * rows + rank * share
        return np.stack([self[number] for number in range(first, first + share)])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Where each window of an epoch begins in the stream of all tokens."""
        rng = np.random.default_rng([self._seed, epoch])
        shifts = rng.integers(0, self._spans - self._counts * self.length + 1)
        within = np.arange(self.windows_per_epoch) - np.repeat(
            np.cumsum(self._counts) - self._counts, self._counts
        )
        windows = np.repeat(self._starts + shifts, self._counts) + within * self.length
        return np.asarray(rng.permutation(windows))
