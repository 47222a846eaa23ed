"""Chunk retrieval: selection in blocks without gradient, then weights with gradient (section 3.1 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

# Scores held at a time: query rows x landmark columns. A GPU wants fewer, larger steps.
QUERY_BLOCK = 256
LANDMARK_BLOCK = 8192
QUERY_BLOCK_GPU = 1024
LANDMARK_BLOCK_GPU = 32768


class RetrievedChunks(NamedTuple):
    """The K chunks selected for each query, best selection score first.

    Attributes:
        chunk_indices: (B, N, K) int64, -1 for an empty slot.
        chunk_weights: (B, N, K) float32 softmax over the selected scores, 0 for an empty slot; differentiable.
        scores: (B, N, K) float32 without noise, -inf for an empty slot.
    """

    chunk_indices: Tensor
    chunk_weights: Tensor
    scores: Tensor


class LandmarkSource(Protocol):
    """Blocks of landmarks; a sequence that is one (`drt.memory.LandmarkIndex`) is read block by block."""

    @property
    def num_landmarks(self) -> int:
        """Of the longest row."""
        ...

    @property
    def num_indexed(self) -> int:
        """Leading landmarks of every row that `nearest` searches, so that they need not all be scored; 0: none."""
        ...

    def nearest(self, query: Tensor, count: int) -> Tensor:
        """At least ``count`` candidates (B, N, R) for the largest dot products of queries (B, N, H) with the indexed
        landmarks, in any order, -1 for an empty slot."""
        ...

    def blocks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """From landmark ``start`` on: blocks (B, n_i, H) in order, each with the number of its first."""
        ...

    def read(self, chunk_indices: Tensor) -> Tensor:
        """Landmarks (B, N, K, H) of chunks (B, N, K)."""
        ...


def retrieve_chunks(
    query: Tensor,
    landmarks: Tensor | Sequence[Tensor],
    visible: Tensor,
    *,
    top_k: int,
    scale: float | Tensor | None = None,
    gumbel: bool = False,
    generator: torch.Generator | None = None,
) -> RetrievedChunks:
    """Select chunks and weight them: softmax over the selected of r = scale * query . landmark.

    However the chunks were found, the scores that become weights are computed in float32, of the landmarks as they are
    held. Gradient reaches query, landmarks and scale by way of the weights; the selection itself has none.

    Args:
        query: (B, N, H).
        landmarks: (B, C, H), or blocks (B, C_i, H) of them in order, which may be read as they are asked for.
        visible: (B, N) int, the number of leading chunks each query may see.
        top_k: slots K.
        scale: factor of the scores, a float or a 0-d tensor; default H^-0.5.
        gumbel: select by scores plus Gumbel noise; the noise never enters the weights.
        generator: source of the noise, on query's device; ``None``: torch's global one of that device.

    Raises:
        ValueError: shapes that do not fit or top_k below 1. What visible holds is checked on the CPU; elsewhere
            looking would stall the device.
    """
    blocks = _as_source(landmarks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chunk_indices = select_chunks(
        query, landmarks, visible, top_k=top_k, scale=scale, gumbel=gumbel, generator=generator
    )
    empty = chunk_indices < 0
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores to 16 bits
        scores = _scores_of(chunk_indices, query, blocks, scale).masked_fill(empty, -torch.inf)
    # A query that sees nothing has no softmax; its weights are 0 by definition.
    weights = torch.softmax(scores.masked_fill(empty.all(-1, keepdim=True), 0.0), -1).masked_fill(empty, 0.0)
    return RetrievedChunks(chunk_indices, weights, scores)


@torch.no_grad()
def select_chunks(
    query: Tensor,
    landmarks: Tensor | Sequence[Tensor],
    visible: Tensor,
    *,
    top_k: int,
    scale: float | Tensor | None = None,
    gumbel: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices (B, N, K) of the best visible chunks, best first, -1 for an empty slot; arguments as `retrieve_chunks`.

    Scores are computed in float32, a block of queries by a block of landmarks at a time; a running top-k is kept.
    Landmarks that are indexed are not scanned where every query sees all of them or nothing: the index names
    candidates, which are ranked by their scores. Noise wants every score, so with ``gumbel`` all are scanned.
    On a GPU nothing here makes the host wait, but for an index.
    """
    blocks = _as_source(landmarks)
    _validate(query, blocks, visible, top_k)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    step = QUERY_BLOCK if query.device.type == "cpu" else QUERY_BLOCK_GPU
    indices = torch.full((*query.shape[:2], top_k), -1, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, query.shape[1], step):
            part = slice(start, start + step)
            indices[:, part] = _select_block(
                query[:, part], blocks, visible[:, part], top_k, scale, gumbel, generator
            )
    return indices


def _select_block(
    query: Tensor,
    blocks: LandmarkSource,
    visible: Tensor,
    top_k: int,
    scale: float | Tensor,
    gumbel: bool,
    generator: torch.Generator | None,
) -> Tensor:
    best = query.new_full((*query.shape[:2], top_k), -torch.inf, dtype=torch.float32)
    indices = torch.full(best.shape, -1, device=query.device)
    start = 0
    if not gumbel and _all_see_the_indexed(blocks, visible):
        start = blocks.num_indexed
        best, indices = _rank_candidates(query, blocks, visible, top_k, scale)
    looking = _may_look(visible)
    sees_most, sees_least = blocks.num_landmarks, 0
    if looking:
        sees_most, sees_least = (int(visible.max()), int(visible.min())) if visible.numel() else (0, 0)
    for first, landmarks in _columns(blocks, start, sees_most):
        scores = _scores(query, landmarks, scale)
        last = first + landmarks.shape[1]
        if gumbel:
            noise = torch.empty_like(scores).exponential_(generator=generator)
            scores -= noise.log_()
        if last > sees_least:
            column = torch.arange(first, last, device=query.device)
            scores.masked_fill_(column >= visible.unsqueeze(-1), -torch.inf)
        if looking and first and bool((scores.amax(-1) <= best[..., -1]).all()):
            continue
        found, at = scores.topk(min(top_k, scores.shape[-1]), -1)
        best, order = torch.cat([best, found], -1).topk(top_k, -1)
        indices = torch.cat([indices, at + first], -1).gather(-1, order)
    return torch.where(best > -torch.inf, indices, -1)


def _all_see_the_indexed(blocks: LandmarkSource, visible: Tensor) -> bool:
    """Whether there is an index, and every query sees all that it holds or nothing."""
    indexed = blocks.num_indexed
    return indexed > 0 and bool(((visible >= indexed) | (visible == 0)).all())


def _rank_candidates(
    query: Tensor, blocks: LandmarkSource, visible: Tensor, top_k: int, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Scores and indices (B, n, K) of the best that the index names, best first."""
    found = blocks.nearest(query * scale, top_k)
    scores = _scores_of(found, query, blocks, scale)
    scores = scores.masked_fill((found < 0) | (visible == 0).unsqueeze(-1), -torch.inf)
    best, order = scores.topk(top_k, -1)
    return best, found.gather(-1, order)


def _scores_of(chunk_indices: Tensor, query: Tensor, blocks: LandmarkSource, scale: float | Tensor) -> Tensor:
    """(B, N, K) float32 scores of chunks (B, N, K); anything at empty slots."""
    chosen = _chosen_landmarks(blocks, chunk_indices, query)
    return torch.einsum("bnh,bnkh->bnk", query.float(), chosen.float()) * scale


def _may_look(tensor: Tensor) -> bool:
    """Whether a tensor's values may be read: elsewhere the device would stall, or a compiled graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _scores(query: Tensor, landmarks: Tensor, scale: float | Tensor) -> Tensor:
    """(B, n, c) float32; a GPU multiplies its 16-bit landmarks as they are, exactly, instead of a float32 copy."""
    on_gpu = query.device.type == "cuda" and landmarks.device == query.device
    if on_gpu and query.dtype == landmarks.dtype and query.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(query, landmarks.mT, out_dtype=torch.float32) * scale
    return (query.float() * scale) @ landmarks.to(query.device).float().mT


def _columns(blocks: LandmarkSource, start: int, sees_most: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first, landmarks) of pieces of bounded size, from ``start`` as far as any query sees."""
    if start >= sees_most:  # no block need be read
        return
    for offset, block in blocks.blocks(start):
        held = min(block.shape[1], sees_most - offset)
        step = LANDMARK_BLOCK if block.device.type == "cpu" else LANDMARK_BLOCK_GPU
        for first in range(0, held, step):
            yield offset + first, block[:, first : min(first + step, held)]
        if offset + block.shape[1] >= sees_most:  # the next block need not be read
            break


class _Blocks:
    """Landmarks at hand as a `LandmarkSource`."""

    num_indexed = 0

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.held = blocks

    @property
    def num_landmarks(self) -> int:
        return sum(block.shape[1] for block in self.held)

    def nearest(self, query: Tensor, count: int) -> Tensor:
        raise NotImplementedError("nothing is indexed")

    def blocks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        offset = 0
        for block in self.held:
            skipped = max(0, start - offset)
            if skipped < block.shape[1]:
                yield offset + skipped, block[:, skipped:]
            offset += block.shape[1]

    def read(self, chunk_indices: Tensor) -> Tensor:
        rows = torch.arange(chunk_indices.shape[0], device=chunk_indices.device).view(-1, 1, 1)
        if len(self.held) == 1:
            return self.held[0][rows, chunk_indices]
        chosen = self.held[0].new_zeros(*chunk_indices.shape, self.held[0].shape[-1])
        offset = 0
        for block in self.held:
            inside = (chunk_indices >= offset) & (chunk_indices < offset + block.shape[1])
            row, at, slot = inside.nonzero(as_tuple=True)
            if len(row):
                chosen = chosen.index_put(
                    (row, at, slot), block[row, chunk_indices[row, at, slot] - offset].to(chosen)
                )
            offset += block.shape[1]
        return chosen

    def validate(self, query: Tensor) -> None:
        """Raise ValueError for a block of another shape."""
        for block in self.held:
            if block.dim() != 3 or block.shape[0] != query.shape[0] or block.shape[2] != query.shape[2]:
                raise ValueError(
                    f"landmarks must be ({query.shape[0]}, C, {query.shape[2]}), got {tuple(block.shape)}"
                )


def _as_source(landmarks: Tensor | Sequence[Tensor]) -> LandmarkSource:
    if isinstance(landmarks, Tensor):
        return _Blocks([landmarks])
    return (
        _Blocks(list(landmarks)) if isinstance(landmarks, list | tuple) else cast(LandmarkSource, landmarks)
    )


def _chosen_landmarks(blocks: LandmarkSource, chunk_indices: Tensor, query: Tensor) -> Tensor:
    """(B, N, K, H) landmarks at (B, N, K) indices; anything at empty slots."""
    if blocks.num_landmarks == 0:
        return query.new_zeros(*chunk_indices.shape, query.shape[-1])
    return blocks.read(chunk_indices.clamp_min(0)).to(query.device)


def _validate(query: Tensor, blocks: LandmarkSource, visible: Tensor, top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if query.dim() != 3 or visible.shape != query.shape[:2]:
        raise ValueError(
            f"query must be (B, N, H) and visible (B, N), got {tuple(query.shape)} and {tuple(visible.shape)}"
        )
    if isinstance(blocks, _Blocks):
        blocks.validate(query)
    held = blocks.num_landmarks
    if visible.numel() and _may_look(visible) and (int(visible.min()) < 0 or int(visible.max()) > held):
        raise ValueError(f"visible must lie in [0, {held}], got {int(visible.min())} to {int(visible.max())}")
