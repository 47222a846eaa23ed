"""The layers of DRT's lower and upper decoder."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.layers.chunked_cross_attention import ChunkedCrossAttention
from drt.layers.grouped_cross_attention import GroupedCrossAttention, RetrievedMemory
from drt.layers.mlp import SwiGLU
from drt.layers.rms_norm import RMSNorm
from drt.layers.window_attention import WindowAttention, WindowState
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.memory_drt import Retrieval


class DRTLowerLayer(GradientCheckpointingLayer):
    """Window attention and MLP."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.window_attention = _window_attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, state: WindowState | None = None) -> Tensor:
        hidden_states = hidden_states + self.window_attention(self.attention_norm(hidden_states), state)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class DRTUpperLayer(GradientCheckpointingLayer):
    """Window attention, grouped cross-attention and MLP.

    What is read from chunks feeds the MLP only; the residual carries the state before it (section 3.2). The fields of a
    `RetrievedMemory`, a `Retrieval` or nothing come as ``chunks``.
    With ``kept`` (B, n), flat indices of positions, only those attend to chunks, by blocks of their own, and go through
    the MLP; (B, n, H) comes out.
    """

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.window_attention = _window_attention(config)
        if config.retrieval:
            learned = config.retriever == "learned"
            attention = GroupedCrossAttention if learned else ChunkedCrossAttention
            self.grouped_cross_attention = attention(
                config.hidden_size,
                config.num_attention_heads,
                config.key_value_shape[1],
                config.sink,
                config.rms_norm_eps,
            )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        block_index: Tensor,
        block_inverse: Tensor,
        state: WindowState | None = None,
        kept: Tensor | None = None,
        *chunks: Tensor | Retrieval,
    ) -> Tensor:
        hidden_states = hidden_states + self.window_attention(self.attention_norm(hidden_states), state)
        if kept is not None:
            hidden_states = hidden_states.flatten(0, 1)[kept]
        informed = hidden_states
        if chunks:
            # Chunks travel from the host while the window is attended to.
            memory = chunks[0].wait() if isinstance(chunks[0], Retrieval) else RetrievedMemory._make(chunks)
            informed = informed + self.grouped_cross_attention(
                hidden_states, memory, block_index, block_inverse
            )
        return hidden_states + self.mlp(self.mlp_norm(informed))


def _window_attention(config: DRTConfig) -> WindowAttention:
    num_key_value_heads, head_dim = config.key_value_shape
    return WindowAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_key_value_heads,
        head_dim,
        config.sliding_window,
        config.position_embedding,
        config.rope_theta,
    )
