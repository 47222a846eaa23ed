"""The chunk memory as one forward pass sees it: the chunks at hand, or those and the ones a cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from drt.layers.fixed_retrievers import FixedRetriever
from drt.layers.grouped_cross_attention import RetrievedMemory
from drt.layers.retriever import Retriever
from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.chunk_layout import ChunkLayout
from drt.models.drt.guidance import GuidedChunks, guide
from drt.ops.chunk_retrieval import RetrievedChunks


class Retrieval:
    """What a group reads. Chunks that come from the host are on their way until somebody waits.

    Args:
        arrive: waits for them.
    """

    def __init__(self, arrive: Callable[[], RetrievedMemory]) -> None:
        self._arrive = arrive
        self._memory: RetrievedMemory | None = None

    def wait(self) -> RetrievedMemory:
        """All of it; the first call waits."""
        if self._memory is None:
            self._memory = self._arrive()
        return self._memory


class ChunkMemory:
    """Chunks that close in this pass, joined with a cache's store where there is one.

    Without a cache everything stays differentiable; with one, the chunks are first appended to its store.

    Args:
        keys: (B, N, S, h_kv, D) of the chunks that close in this pass.
        values: (B, N, S, h_kv, D).
        landmarks: (B, N, H) retrieval keys, or (B, N, E) those of a fixed retriever.
        layout: of this pass.
        cache: the decoding state, or ``None``.
        guided: chunks that should find certain others, without a cache.

    Attributes:
        guidance: (loss, recall) of each group that has retrieved, as `guide` gives them; empty without ``guided``.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        landmarks: Tensor,
        layout: ChunkLayout,
        cache: DRTCache | None,
        guided: GuidedChunks | None = None,
    ) -> None:
        self.guided = guided
        self.guidance: list[tuple[Tensor, Tensor]] = []
        self.keys, self.values, self.landmarks = keys, values, landmarks
        self.layout = layout
        self.cache = cache
        # On the device from the start: to bring numbers there makes the host wait for all that is queued.
        visible = layout.upper.chunks_before
        closes = visible >= 0
        if cache is not None:
            if cache.closed_counts is not None:
                visible = visible + cache.closed_counts.to(visible.device).unsqueeze(1)
            if landmarks.shape[1]:
                cache.store.append(keys, values, landmarks, layout.chunk_lengths, layout.closed_counts)
        self.visible = torch.where(closes, visible, 0)

    def retrieve(
        self, group: int, retriever: Retriever | FixedRetriever, hidden_states: Tensor, gumbel: bool
    ) -> RetrievedMemory | Retrieval:
        """What group ``group`` reads in each block of positions; from a cache it may still be on its way.

        Args:
            group: number of the group.
            retriever: its query side.
            hidden_states: (B, M, H) at the upper decoder's positions, as they enter the group.
            gumbel: select by noisy scores.

        Returns:
            N + 1 blocks: first what the cache carries from earlier passes (nothing without one), then what each of
            the N landmarks among the positions retrieves.
        """
        ask = self._ask(retriever, hidden_states, gumbel)
        if self.cache is None:
            found = ask(self.landmarks)
            if self.guided is not None:
                assert isinstance(retriever, Retriever)  # checked
                states = hidden_states.flatten(0, 1)[self.layout.upper.landmark_index]
                self.guidance.append(
                    guide(retriever, states, self.landmarks, found.chunk_indices, self.guided)
                )
            indices = pad(found.chunk_indices, (0, 0, 1, 0), value=-1)
            weights = pad(found.chunk_weights, (0, 0, 1, 0))
            return RetrievedMemory(self.keys, self.values, self.layout.chunk_lengths, indices, weights)
        return self._retrieve_from_cache(self.cache, group, retriever.top_k, ask)

    def _ask(
        self, retriever: Retriever | FixedRetriever, hidden_states: Tensor, gumbel: bool
    ) -> Callable[[Tensor | Sequence[Tensor]], RetrievedChunks]:
        """The retriever with its queries: from landmarks to what the chunks that close here select of them."""
        upper = self.layout.upper
        if isinstance(retriever, FixedRetriever):  # it asks by text, so by the keys of the chunks themselves
            chunk = upper.skipped_chunks.unsqueeze(1) + torch.arange(self.visible.shape[1], device="cpu")
            chunk = chunk.clamp_max(max(self.landmarks.shape[1] - 1, 0)).to(self.landmarks.device)
            rows = torch.arange(len(chunk), device=chunk.device).unsqueeze(1)
            query = self.landmarks[rows, chunk]
            return lambda landmarks: retriever(query, landmarks, self.visible)
        states = hidden_states.flatten(0, 1)[upper.landmark_index]
        return lambda landmarks: retriever(states, landmarks, self.visible, gumbel)

    def _retrieve_from_cache(
        self,
        cache: DRTCache,
        group: int,
        top_k: int,
        ask: Callable[[Tensor | Sequence[Tensor]], RetrievedChunks],
    ) -> RetrievedMemory | Retrieval:
        carried = cache.selections[group]
        if carried is None:
            carried = self._nothing(top_k)
        if self.visible.shape[1] == 0:
            return RetrievedMemory(*(tensor.unsqueeze(1) for tensor in carried))
        found = ask(cache.store.landmark_blocks())
        arrive = cache.store.prefetch(found.chunk_indices)

        def remember() -> RetrievedMemory:
            device = self.keys.device
            keys, values, lengths = arrive()
            # A store may hold chunks in another precision than the model's.
            arrived = (keys.to(self.keys), values.to(self.keys), lengths.to(device))
            new = (*arrived, found.chunk_indices, found.chunk_weights)
            blocks = RetrievedMemory(
                *(torch.cat([old.unsqueeze(1), t], 1) for old, t in zip(carried, new, strict=True))
            )
            rows = torch.arange(len(self.visible), device=device)
            last = self.layout.upper.closed_counts.to(device)
            cache.selections[group] = RetrievedMemory(*(tensor[rows, last] for tensor in blocks))
            return blocks

        return Retrieval(remember)

    def _nothing(self, top_k: int) -> RetrievedMemory:
        """A selection of empty slots, (B, K, ...)."""
        batch_size, _, *chunk_shape = self.keys.shape
        empty = self.keys.new_zeros(batch_size, top_k, *chunk_shape)
        indices = torch.full((batch_size, top_k), -1, device=self.keys.device)
        weights = torch.zeros(indices.shape, device=self.keys.device)
        return RetrievedMemory(empty, empty, torch.zeros_like(indices), indices, weights)
