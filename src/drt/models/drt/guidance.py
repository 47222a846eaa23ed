"""Guidance: the retrieval scores of a question compared with the chunks that are known to answer it.

The loss of the next token alone trains the retriever; guidance makes it learn sooner where the right chunk is known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drt.layers.retriever import Retriever
from drt.models.drt.chunk_layout import ChunkLayout


class GuidedChunks(NamedTuple):
    """Which chunks should find which, in one pass.

    Attributes:
        row: (m,) rows of the batch.
        asking: (m,) chunks whose landmarks ask.
        wanted: (m,) chunks to be found, earlier than those that ask.
    """

    row: Tensor
    asking: Tensor
    wanted: Tensor


def guided_chunks(targets: Tensor, layout: ChunkLayout) -> GuidedChunks:
    """The chunks of pairs of tokens.

    Args:
        targets: (n, 3) int64: a row, the column of a token, and the column of an earlier token whose chunk the chunk of
            the first should find. Pairs of one chunk, and of a chunk that stays open, are left out.
        layout: of the pass.

    Raises:
        ValueError: not of that shape, or a row or column that the input does not have.
    """
    rows, length = layout.chunk_of_token.shape
    held = targets.cpu()
    if held.dim() != 2 or held.shape[1] != 3:
        raise ValueError(f"expected retrieval_targets of shape (n, 3), got {tuple(held.shape)}")
    limit = torch.tensor([rows, length, length], device="cpu")
    if bool(((held < 0) | (held >= limit)).any()):
        raise ValueError(f"expected retrieval_targets below {limit.tolist()} (row, column, column)")
    row = held[:, 0]
    asking, wanted = (layout.chunk_of_token[row, held[:, column]] for column in (1, 2))
    seen = (wanted < asking) & (asking < layout.closed_counts[row])
    device = layout.token_index.device
    return GuidedChunks(*(part[seen].to(device) for part in (row, asking, wanted)))


def guide(
    retriever: Retriever, landmark_states: Tensor, landmarks: Tensor, found: Tensor, guided: GuidedChunks
) -> tuple[Tensor, Tensor]:
    """How well one group finds what is known to be right.

    Args:
        retriever: of the group.
        landmark_states: (B, N, H) as they enter the group.
        landmarks: (B, N, H) retrieval keys.
        found: (B, N, K) chunks that were selected.
        guided: which chunks should find which.

    Returns:
        The cross-entropy of the scores of all earlier chunks with the right one, and the share of the right ones that
        were selected; both means over the pairs, 0-d, 0 where there are none.
    """
    scores = retriever.scores(landmark_states, landmarks)[guided.row, guided.asking]
    chunk = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(chunk >= guided.asking.unsqueeze(1), -torch.inf)
    count = max(len(guided.row), 1)
    loss = F.cross_entropy(scores, guided.wanted, reduction="sum") / count
    hits = (found[guided.row, guided.asking] == guided.wanted.unsqueeze(1)).any(-1)
    return loss, hits.float().sum() / count
