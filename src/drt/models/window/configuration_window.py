"""Configuration of the sliding-window language model."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import MOST_TOKENS, DecoderConfig


@strict
class WindowConfig(DecoderConfig):
    """Sizes of a decoder with window attention only.

    Args:
        sliding_window: keys W that a position sees, itself included.
        Others as in `DecoderConfig`.
    """

    model_type = "window"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **DecoderConfig.ranges,
        "sliding_window": (1, MOST_TOKENS),
    }

    position_embedding: str = "alibi"
    sliding_window: int = 512
