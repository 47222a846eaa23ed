"""The Landmark Attention language model (arXiv 2305.16300)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from drt.layers.full_attention import GrowingState
from drt.layers.landmark_attention import LandmarkAttention
from drt.layers.mlp import SwiGLU
from drt.layers.rms_norm import RMSNorm
from drt.models.common.cache import DecoderCache, GrowingCacheLayer
from drt.models.common.inputs import check_arguments
from drt.models.common.modeling import DecoderGenerationMixin, DecoderPreTrainedModel
from drt.models.common.rows import LayerInputs
from drt.models.landmark.configuration_landmark import LandmarkConfig
from drt.models.landmark.landmark_rows import LandmarkRows, place_landmarks


class LandmarkLayer(GradientCheckpointingLayer):
    """Landmark Attention and MLP."""

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LandmarkAttention(
            config.hidden_size,
            config.num_attention_heads,
            *config.key_value_shape,
            config.chunk_size,
            config.retrieval_top_k,
            config.local_chunks,
            config.max_chunk_distance,
            config.rope_theta,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, held: Tensor, state: GrowingState | None = None) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), held, state)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class LandmarkPreTrainedModel(DecoderPreTrainedModel):
    """What `LandmarkModel` and `LandmarkForCausalLM` share with the library's machinery."""

    config: LandmarkConfig
    config_class = LandmarkConfig
    _no_split_modules = ["LandmarkLayer"]  # noqa: RUF012 (no ClassVar in the base class)

    def make_cache(self) -> DecoderCache:
        """An empty decoding state: linear in the length of the text."""
        count = self.config.num_hidden_layers
        return DecoderCache(lambda: [GrowingCacheLayer() for _ in range(count)])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LandmarkModel):
            init.normal_(module.landmark_embedding, mean=0.0, std=self.config.initializer_range)


class LandmarkModel(LandmarkPreTrainedModel):
    """Token ids to hidden states; landmarks are put in and taken out inside."""

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.landmark_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(LandmarkLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        chunk_ends: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack over new tokens; arguments as in `DecoderGenerationMixin.forward`.

        Chunks are always full: ``chunk_ends`` is not used.
        """
        check_arguments(self.config, output_attentions, position_ids, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        source, new, rows, cache = self.begin_pass(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, chunk_ends, use_cache
        )
        batch_size, length = source.shape[:2]
        held = None if cache is None else cache.layers[0].lengths
        if held is None:
            held = torch.zeros(batch_size, dtype=torch.long, device="cpu")
        layout = place_landmarks(rows, held, length, self.config.chunk_size, source.device)
        states = [None] * len(self.layers) if cache is None else cache.layers
        for state in states:
            if state is not None:
                state.row_lengths = layout.lengths
        hidden_states = self._embed(source, layout)
        inputs = LayerInputs(bool(output_hidden_states), rows, layout)
        for layer, state in zip(self.layers, states, strict=True):
            hidden_states = layer(inputs.keep(hidden_states), held, state)
        hidden_states = self.norm(hidden_states.flatten(0, 1)[layout.output_index])
        hidden_states = rows.unpack(hidden_states)
        if cache is not None:
            cache.finish(hidden_states, new)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=inputs.output(hidden_states),
        )

    def _embed(self, source: Tensor, layout: LandmarkRows) -> Tensor:
        """Embeddings (B, P, H) of tokens and landmarks."""
        placed = source.flatten(0, 1)[layout.token_index]
        embeds = self.embed_tokens(placed) if source.dim() == 2 else placed
        landmark = self.landmark_embedding.to(embeds.dtype)
        return torch.where(layout.is_landmark.unsqueeze(-1), landmark, embeds)


class LandmarkForCausalLM(DecoderGenerationMixin, LandmarkPreTrainedModel):
    """The Landmark Attention model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar in the base class)

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.model = LandmarkModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
