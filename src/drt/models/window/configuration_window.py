"""Configuration of the sliding-window language model."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import DecoderConfig


@strict
class WindowConfig(DecoderConfig):
    """Sizes of a decoder with window attention only.

    Args:
        sliding_window: keys W that a position sees, itself included.
        Others as in `DecoderConfig`.
    """

    model_type = "window"
    least_sizes: ClassVar[dict[str, int]] = {"sliding_window": 1}

    position_embedding: str = "alibi"
    sliding_window: int = 512
