"""Configuration of the Landmark Attention language model (arXiv 2305.16300)."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import (
    MOST_CHUNK_TOKENS,
    MOST_CHUNKS,
    MOST_RETRIEVED,
    MOST_TOKENS,
    DecoderConfig,
)


@strict
class LandmarkConfig(DecoderConfig):
    """Sizes of a decoder with Landmark Attention. Positions are rotary.

    Args:
        chunk_size: tokens S of a chunk (its landmark not counted).
        retrieval_top_k: chunks that each query and head retrieves outside training.
        local_chunks: chunks before the query's own that it always reads outside training.
        max_chunk_distance: distance in chunks beyond which positions stay the same outside training: the longest
            that training shows, so training length / chunk_size.
        Others as in `DecoderConfig`.
    """

    model_type = "landmark"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **DecoderConfig.ranges,
        "chunk_size": (1, MOST_CHUNK_TOKENS),
        "retrieval_top_k": (1, MOST_RETRIEVED),
        "local_chunks": (0, MOST_CHUNKS),
        "max_chunk_distance": (1, MOST_TOKENS),
    }

    chunk_size: int = 63
    retrieval_top_k: int = 8
    local_chunks: int = 8
    max_chunk_distance: int = 256

    def validate_position_embedding(self) -> None:
        """Part of ``PreTrainedConfig`` validation: the only kind of position this model has."""
        if self.position_embedding != "rope":
            raise ValueError(f'position_embedding must be "rope", got {self.position_embedding!r}')
