"""Configuration of the full-attention language model."""

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import DecoderConfig


@strict
class FullAttentionConfig(DecoderConfig):
    """Sizes of a decoder whose every position sees all before it; arguments as in `DecoderConfig`."""

    model_type = "full_attention"
