"""The query side of retrieval: a group's norm and temperature over landmark states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drt.layers.rms_norm import RMSNorm
from drt.ops.chunk_retrieval import RetrievedChunks, retrieve_chunks


class Retriever(nn.Module):
    """Score past chunks for one group of upper layers and select the best.

    Args:
        hidden_size: width H of landmark states and retrieval keys.
        top_k: chunks selected per query.
        eps: epsilon of the query's norm.
        learned_temperature: multiply the scores by ``exp(log_temperature)``, a parameter that starts at 0.
    """

    def __init__(self, hidden_size: int, top_k: int, eps: float, learned_temperature: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.log_temperature = nn.Parameter(torch.zeros(())) if learned_temperature else None

    def forward(
        self, landmark_states: Tensor, landmarks: Tensor | Sequence[Tensor], visible: Tensor, gumbel: bool
    ) -> RetrievedChunks:
        """Retrieve for each closed chunk.

        Args:
            landmark_states: (B, N, H) hidden states at the landmarks, as they enter the group.
            landmarks: (B, C, H) retrieval keys of all chunks, or blocks of them in order.
            visible: (B, N) how many leading chunks each query may see.
            gumbel: select by noisy scores.
        """
        query = self.norm(landmark_states)
        return retrieve_chunks(
            query, landmarks, visible, top_k=self.top_k, scale=self._scale(), gumbel=gumbel
        )

    def scores(self, landmark_states: Tensor, landmarks: Tensor) -> Tensor:
        """(B, N, C) float32 scores of all chunks (B, C, H) for all queries (B, N, H), without noise, differentiable."""
        query = self.norm(landmark_states)
        with torch.autocast(query.device.type, enabled=False):  # it would round the scores to 16 bits
            return (query.float() @ landmarks.float().mT) * self._scale()

    def _scale(self) -> float | Tensor:
        scale: float | Tensor = self.norm.weight.shape[0] ** -0.5
        return scale if self.log_temperature is None else scale * self.log_temperature.float().exp()
