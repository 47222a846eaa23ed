"""The sliding-window language model: what DRT is without landmarks, chunks and retrieval."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.layers.mlp import SwiGLU
from drt.layers.rms_norm import RMSNorm
from drt.layers.window_attention import WindowAttention, WindowState
from drt.models.common.cache import DecoderCache, WindowCacheLayer
from drt.models.common.modeling import DecoderGenerationMixin, DecoderPreTrainedModel, StackModel
from drt.models.window.configuration_window import WindowConfig


class WindowLayer(GradientCheckpointingLayer):
    """Window attention and MLP, as in DRT's lower decoder."""

    def __init__(self, config: WindowConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.window_attention = WindowAttention(
            config.hidden_size,
            config.num_attention_heads,
            *config.key_value_shape,
            config.sliding_window,
            config.position_embedding,
            config.rope_theta,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, state: WindowState | None = None) -> Tensor:
        hidden_states = hidden_states + self.window_attention(self.attention_norm(hidden_states), state)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class WindowPreTrainedModel(DecoderPreTrainedModel):
    """What `WindowModel` and `WindowForCausalLM` share with the library's machinery."""

    config: WindowConfig
    config_class = WindowConfig
    _no_split_modules = ["WindowLayer"]  # noqa: RUF012 (no ClassVar in the base class)

    def make_cache(self) -> DecoderCache:
        """An empty decoding state: constant in the length of the text."""
        config = self.config
        return DecoderCache(
            lambda: [WindowCacheLayer(config.sliding_window) for _ in range(config.num_hidden_layers)]
        )


class WindowModel(WindowPreTrainedModel, StackModel):
    """Token ids to hidden states."""

    def __init__(self, config: WindowConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WindowLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class WindowForCausalLM(DecoderGenerationMixin, WindowPreTrainedModel):
    """The sliding-window model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar in the base class)

    def __init__(self, config: WindowConfig) -> None:
        super().__init__(config)
        self.model = WindowModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
