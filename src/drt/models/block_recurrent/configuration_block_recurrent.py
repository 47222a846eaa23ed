"""Configuration of the Block-Recurrent Transformer (arXiv 2203.07852)."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from drt.models.common.configuration import MOST_CHUNK_TOKENS, MOST_CHUNKS
from drt.models.window.configuration_window import WindowConfig


@strict
class BlockRecurrentConfig(WindowConfig):
    """Sizes of a sliding-window decoder with one recurrent layer.

    Args:
        block_size: tokens that the recurrent layer reads before its state changes.
        num_states: vectors of the recurrent state.
        recurrent_layer: index of the recurrent layer. Default: that after three quarters of the layers (the paper's
            10th of 12).
        Others as in `WindowConfig`.
    """

    model_type = "block_recurrent"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **WindowConfig.ranges,
        "block_size": (1, MOST_CHUNK_TOKENS),
        "num_states": (1, MOST_CHUNKS),
    }

    block_size: int = 512
    num_states: int = 512
    recurrent_layer: int | None = None

    @property
    def recurrent_index(self) -> int:
        """The index of the recurrent layer, with what stood for ``None`` filled in."""
        return 3 * self.num_hidden_layers // 4 if self.recurrent_layer is None else self.recurrent_layer

    def validate_recurrent_layer(self) -> None:
        """Part of ``PreTrainedConfig`` validation: the recurrent layer is one of the layers."""
        if self.recurrent_layer is not None and not 0 <= self.recurrent_layer < self.num_hidden_layers:
            raise ValueError(
                f"recurrent_layer must lie in [0, {self.num_hidden_layers}), got {self.recurrent_layer}"
            )
