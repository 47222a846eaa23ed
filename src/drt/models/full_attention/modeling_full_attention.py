"""The full-attention language model."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.layers.full_attention import FullAttention, GrowingState
from drt.layers.mlp import SwiGLU
from drt.layers.rms_norm import RMSNorm
from drt.models.common.cache import DecoderCache, GrowingCacheLayer
from drt.models.common.modeling import DecoderGenerationMixin, DecoderPreTrainedModel, StackModel
from drt.models.full_attention.configuration_full_attention import FullAttentionConfig


class FullAttentionLayer(GradientCheckpointingLayer):
    """Full attention and MLP."""

    def __init__(self, config: FullAttentionConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = FullAttention(
            config.hidden_size,
            config.num_attention_heads,
            *config.key_value_shape,
            config.position_embedding,
            config.rope_theta,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, state: GrowingState | None = None) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), state)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class FullAttentionPreTrainedModel(DecoderPreTrainedModel):
    """What `FullAttentionModel` and `FullAttentionForCausalLM` share with the library's machinery."""

    config: FullAttentionConfig
    config_class = FullAttentionConfig
    _no_split_modules = ["FullAttentionLayer"]  # noqa: RUF012 (no ClassVar in the base class)

    def make_cache(self) -> DecoderCache:
        """An empty decoding state: linear in the length of the text."""
        count = self.config.num_hidden_layers
        return DecoderCache(lambda: [GrowingCacheLayer() for _ in range(count)])


class FullAttentionModel(FullAttentionPreTrainedModel, StackModel):
    """Token ids to hidden states."""

    def __init__(self, config: FullAttentionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FullAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class FullAttentionForCausalLM(DecoderGenerationMixin, FullAttentionPreTrainedModel):
    """The full-attention model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar in the base class)

    def __init__(self, config: FullAttentionConfig) -> None:
        super().__init__(config)
        self.model = FullAttentionModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
