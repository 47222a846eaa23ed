"""The Block-Recurrent Transformer (arXiv 2203.07852)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.layers.mlp import SwiGLU
from drt.layers.recurrent_cell import RecurrentCell
from drt.layers.rms_norm import RMSNorm
from drt.models.block_recurrent.cache_block_recurrent import RecurrentCacheLayer
from drt.models.block_recurrent.configuration_block_recurrent import BlockRecurrentConfig
from drt.models.common.cache import DecoderCache, WindowCacheLayer
from drt.models.common.modeling import DecoderGenerationMixin, DecoderPreTrainedModel, StackModel
from drt.models.window.modeling_window import WindowLayer


class RecurrentLayer(GradientCheckpointingLayer):
    """The recurrent cell and MLP."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cell = RecurrentCell(
            config.hidden_size,
            config.num_attention_heads,
            *config.key_value_shape,
            config.sliding_window,
            config.position_embedding,
            config.rope_theta,
            config.num_states,
            config.block_size,
            config.rms_norm_eps,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, state: RecurrentCacheLayer | None = None) -> Tensor:
        normed = self.attention_norm(hidden_states)
        if state is None:
            read, _ = self.cell(normed, None, None, None)
        else:
            read, state.block = self.cell(normed, state.block, state.row_lengths, state)
        hidden_states = hidden_states + read
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class BlockRecurrentPreTrainedModel(DecoderPreTrainedModel):
    """What `BlockRecurrentModel` and `BlockRecurrentForCausalLM` share with the library's machinery."""

    config: BlockRecurrentConfig
    config_class = BlockRecurrentConfig
    _no_split_modules = ["WindowLayer", "RecurrentLayer"]  # noqa: RUF012 (no ClassVar in the base class)

    def make_cache(self) -> DecoderCache:
        """An empty decoding state: constant in the length of the text."""
        config = self.config

        def make_layers() -> list[WindowCacheLayer]:
            layers = [WindowCacheLayer(config.sliding_window) for _ in range(config.num_hidden_layers)]
            layers[config.recurrent_index] = RecurrentCacheLayer(config.sliding_window)
            return layers

        return DecoderCache(make_layers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentCell):
            for states in (module.first_state, module.state_ids):
                init.normal_(states, mean=0.0, std=self.config.initializer_range)
            init.ones_(module.gate_bias)  # a state changes slowly at first


class BlockRecurrentModel(BlockRecurrentPreTrainedModel, StackModel):
    """Token ids to hidden states."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            RecurrentLayer(config) if number == config.recurrent_index else WindowLayer(config)
            for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class BlockRecurrentForCausalLM(DecoderGenerationMixin, BlockRecurrentPreTrainedModel):
    """The Block-Recurrent Transformer with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar in the base class)

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.model = BlockRecurrentModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
