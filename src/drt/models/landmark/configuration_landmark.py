"""Configuration of the Landmark Attention language model (arXiv 2305.16300)."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import DecoderConfig


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
    least_sizes: ClassVar[dict[str, int]] = {
        "chunk_size": 1,
        "retrieval_top_k": 1,
        "local_chunks": 0,
        "max_chunk_distance": 1,
    }

    chunk_size: int = 63
    retrieval_top_k: int = 8
    local_chunks: int = 8
    max_chunk_distance: int = 256

    def validate_position_embedding(self) -> None:
        """Part of ``PreTrainedConfig`` validation: the only kind of position this model has."""
        if self.position_embedding != "rope":
            raise ValueError(f'position_embedding must be "rope", got {self.position_embedding!r}')
