"""The Differentiable Retrieval-based Transformer as a Hugging Face model (arXiv 2410.01651)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from drt.layers.chunk_encoder import ChunkEncoder
from drt.layers.fixed_retrievers import FIXED_RETRIEVERS, FixedRetriever
from drt.layers.grouped_cross_attention import RetrievedMemory
from drt.layers.retriever import Retriever
from drt.layers.rms_norm import RMSNorm
from drt.layers.window_attention import WindowAttention, WindowState
from drt.models.common.loss import causal_loss, needs_no_logits
from drt.models.common.packaged import PackagedCode
from drt.models.common.rows import LayerInputs, NewTokens, PackedRows, keep_columns, pack_rows
from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.chunk_layout import ChunkLayout, build_chunk_layout, upper_reach
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.generation_drt import DRTGenerationMixin
from drt.models.drt.guidance import GuidedChunks, guided_chunks
from drt.models.drt.layers_drt import DRTLowerLayer, DRTUpperLayer
from drt.models.drt.memory_drt import ChunkMemory, Retrieval
from drt.models.drt.outputs_drt import DRTCausalLMOutput, DRTModelOutput
from drt.models.drt.validation import check_arguments, check_inputs, scored_labels
from drt.ops.window_attention import alibi_slopes

logger = logging.get_logger(__name__)


class _Run(NamedTuple):
    """What a pass of the stack gives: its output where it is required, before the norm; what each group retrieved; and,
    where it is required, the guidance of each group."""

    hidden_states: Tensor
    retrieved: list[RetrievedMemory]
    guidance: list[tuple[Tensor, Tensor]]


class DRTPreTrainedModel(PackagedCode, PreTrainedModel):
    """What `DRTModel` and `DRTForCausalLM` share with the library's machinery."""

    config: DRTConfig
    config_class = DRTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The base class makes both of these attributes of each instance, so ClassVar would be wrong.
    _no_split_modules = ["DRTLowerLayer", "DRTUpperLayer", "ChunkEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # a chunk memory cannot be rolled back: assisted decoding must refuse

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, WindowAttention) and module.alibi_slopes is not None:
            init.copy_(module.alibi_slopes, alibi_slopes(module.alibi_slopes.shape[0]))
        elif isinstance(module, Retriever) and module.log_temperature is not None:
            init.zeros_(module.log_temperature)
        elif isinstance(module, DRTModel):
            init.normal_(module.landmark_embedding, mean=0.0, std=self.config.initializer_range)


class DRTModel(DRTPreTrainedModel):
    """Token ids to hidden states.

    Lower decoder, chunk encoder, then groups of upper layers that each retrieve once and read what they retrieved.
    """

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.landmark_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.lower_layers = nn.ModuleList(DRTLowerLayer(config) for _ in range(config.num_lower_layers))
        if config.retrieval:
            num_key_value_heads, head_dim = config.key_value_shape
            self.chunk_encoder = ChunkEncoder(
                config.num_encoder_layers,
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                num_key_value_heads,
                head_dim,
                config.rope_theta,
                config.rms_norm_eps,
                config.encoder_rms_norm_eps,
            )
            memory_width = num_key_value_heads * head_dim
            self.chunk_k_proj = nn.Linear(config.hidden_size, memory_width, bias=False)
            self.chunk_v_proj = nn.Linear(config.hidden_size, memory_width, bias=False)
            self.retrievers = nn.ModuleList(_retriever(config) for _ in config.layers_per_group)
        self.upper_layers = nn.ModuleList(DRTUpperLayer(config) for _ in range(sum(config.layers_per_group)))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DRTCache | None = None,
        inputs_embeds: Tensor | None = None,
        chunk_ends: Tensor | None = None,
        use_cache: bool | None = None,
        output_retrieval: bool = False,
        states_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        only_remember: bool = False,
        retrieval_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> DRTModelOutput:
        """Run the stack over new tokens.

        A text that is only read, that is with ``states_to_keep`` and a cache, without gradient and without
        ``output_retrieval``, costs the lower decoder and the chunk encoder: the upper decoder then runs over the end of
        it alone, as far back as the states and the cache need (`upper_reach`), with the same results.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) or (B, past + L), zeros at padding: before a row's tokens, or without a cache behind
                them too. What stands at padding in the output means nothing. For the columns that
                ``past_key_values`` holds it must say what it said when they were read.
            position_ids: (B, L), not needed: positions follow from the mask and the cache. Where they begin again at 0
                inside a row another document begins, which sees nothing of the one before (packed rows, without a
                cache; each is computed as a row of its own, padded to the longest, and counts as one in what
                ``output_retrieval`` returns).
            past_key_values: the state to continue from.
            inputs_embeds: (B, L, H) instead of ``input_ids``.
            chunk_ends: (B, L) bool: close the open chunk after this token.
            use_cache: return a state to continue from. Default: whether ``past_key_values`` is given, or
                ``config.use_cache`` where no gradient is recorded and every row is one document without padding behind
                it.
            output_retrieval: also return what each group retrieved.
            states_to_keep: hidden states of the last n tokens only (0: all), of the columns in a tensor (n,), or of
                each row's own columns (B, n).
            output_hidden_states: also return what every layer gives. Default: ``config.output_hidden_states``.
            output_attentions: refused: attention weights are made in blocks and never held.
            only_remember: see `remember`.
            retrieval_targets: (n, 3) int64, in training without a cache: a row, the column of a token, and the column
                of an earlier token whose chunk the chunk of the first should find. See `drt.models.drt.guidance`.
            kwargs: what else the library hands to models; what says something that is not heeded is refused.

        Raises:
            ValueError: for input that cannot be laid out; the message names what was expected and what was given.
        """
        check_arguments(self.config, output_attentions, position_ids, kwargs)
        wants_layers = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        wants_layers = bool(wants_layers) and not only_remember
        new = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask, position_ids, chunk_ends, past_key_values
        )
        cache = self._cache(past_key_values, use_cache, new)
        source = input_ids if input_ids is not None else inputs_embeds
        assert source is not None  # checked
        rows, mask = PackedRows(None, None, None), new.mask
        if new.starts is not None:
            rows = pack_rows(new, (source.shape[0], source.shape[1]), source.device)
            source, mask = rows.pack(source), rows.mask()
            chunk_ends = None if chunk_ends is None else rows.pack(chunk_ends.to(source.device))
        kept = states_to_keep if isinstance(states_to_keep, Tensor) else states_to_keep or None
        whole = new.starts is not None or wants_layers
        last = kept if isinstance(kept, int) else 0
        only_read = last and cache is not None and not output_retrieval and not torch.is_grad_enabled()
        reach = 1 if only_remember else upper_reach(self.config, last)
        layout = build_chunk_layout(
            source.shape[0],
            source.shape[1],
            self.config.chunk_size,
            landmark_predicts=self.config.landmark_predicts,
            attention_mask=mask,
            chunk_ends=chunk_ends,
            open_lengths=None if cache is None else cache.open_lengths,
            kept=None if whole else kept,
            reach=reach if only_read and not whole else None,
            device=source.device,
        )
        if cache is not None:
            cache.begin(layout)
        guided = None
        if retrieval_targets is not None:
            learned = self.config.retrieval and self.config.retriever == "learned"
            if cache is not None or new.starts is not None or not learned:
                raise ValueError(
                    "retrieval_targets need learned retrieval, rows of one document each, and a pass without a cache"
                )
            guided = guided_chunks(retrieval_targets, layout)
        inputs = LayerInputs(wants_layers, rows, layout)
        run = self._run(source, layout, cache, only_remember, inputs, guided)
        if cache is not None:
            cache.finish(layout, new)
        if only_remember:
            assert cache is not None
            cache.drop_upper()
            return DRTModelOutput(past_key_values=cache)
        hidden_states = rows.unpack(self.norm(run.hidden_states))
        return DRTModelOutput(
            last_hidden_state=keep_columns(hidden_states, kept) if whole else hidden_states,
            past_key_values=cache,
            hidden_states=inputs.output(hidden_states),
            chunk_indices=tuple(memory.chunk_indices[:, 1:] for memory in run.retrieved)
            if output_retrieval
            else None,
            chunk_weights=tuple(memory.chunk_weights[:, 1:] for memory in run.retrieved)
            if output_retrieval
            else None,
            retrieval_loss=torch.stack([loss for loss, _ in run.guidance]).mean() if run.guidance else None,
            retrieval_recall=torch.stack([hits for _, hits in run.guidance]).mean() if run.guidance else None,
        )

    @torch.no_grad()
    def remember(self, input_ids: Tensor, cache: DRTCache, chunk_ends: Tensor | None = None) -> None:
        """Read tokens into a cache's chunk memory without the upper decoder, which the memory does not need.

        The cost of a token is that of the lower decoder and the encoder, whatever was read before. The upper decoder's
        state is dropped: before anything is predicted, a pass over `upper_reach` positions at least (with
        ``states_to_keep`` or without) has to make it anew.

        Args:
            input_ids: (B, L) int64.
            cache: the decoding state.
            chunk_ends: (B, L) bool: close the open chunk after this token.

        Raises:
            ValueError: for input that cannot be laid out, or a model without a chunk memory (``retrieval=False``).
        """
        if not self.config.retrieval:
            raise ValueError(
                "a model with retrieval=False has no chunk memory: there is nothing to remember in"
            )
        # By the module's call: an offloaded model has its weights only then.
        self(input_ids, past_key_values=cache, chunk_ends=chunk_ends, states_to_keep=1, only_remember=True)

    def _run(
        self,
        source: Tensor,
        layout: ChunkLayout,
        cache: DRTCache | None,
        only_remember: bool,
        inputs: LayerInputs,
        guided: GuidedChunks | None,
    ) -> _Run:
        """The stack over packed rows."""
        hidden_states = self._embed(source, layout)
        states: Sequence[WindowState | None] = (
            [None] * self.config.num_hidden_layers if cache is None else cache.layers
        )
        for layer, state in zip(self.lower_layers, states, strict=False):
            hidden_states = layer(inputs.keep(hidden_states), state)
        if self.upper_layers:  # before the memory is made of it
            hidden_states = inputs.keep(hidden_states)
        memory = (
            self._remember(source, hidden_states, layout, cache, guided) if self.config.retrieval else None
        )
        retrieved: list[RetrievedMemory] = []
        if not only_remember:
            upper_states = states[len(self.lower_layers) :]
            hidden_states, retrieved = self._upper(hidden_states, layout, memory, upper_states, inputs)
        return _Run(hidden_states, retrieved, [] if memory is None else memory.guidance)

    def _cache(
        self, past_key_values: DRTCache | None, use_cache: bool | None, new: NewTokens
    ) -> DRTCache | None:
        held = None if past_key_values is None else past_key_values.open_lengths is not None
        if not new.wants_cache(use_cache, held, self.config.use_cache):
            return None
        if torch.is_grad_enabled():
            logger.warning_once(
                "No gradient flows through a cache's chunk memory; train with use_cache=False."
            )
        return DRTCache(self.config) if past_key_values is None else past_key_values

    def _embed(self, source: Tensor, layout: ChunkLayout) -> Tensor:
        """Compact embeddings (B, compact_length, H) of tokens and landmarks."""
        compact = source.flatten(0, 1)[layout.token_index]
        embeds = self.embed_tokens(compact) if source.dim() == 2 else compact
        landmark = self.landmark_embedding.to(embeds.dtype)
        return torch.where(layout.is_landmark.unsqueeze(-1), landmark, embeds)

    def _upper(
        self,
        hidden_states: Tensor,
        layout: ChunkLayout,
        memory: ChunkMemory | None,
        states: Sequence[WindowState | None],
        inputs: LayerInputs,
    ) -> tuple[Tensor, list[RetrievedMemory]]:
        """Groups of upper layers; returns their output where it is required and what each group retrieved.

        The last layer attends to chunks, and runs its MLP, at the expected positions alone.
        """
        upper = layout.upper
        if upper.index is not None:
            hidden_states = hidden_states.flatten(0, 1)[upper.index]
        group_of = [group for group, layers in enumerate(self.config.layers_per_group) for _ in range(layers)]
        retrieved: list[RetrievedMemory | Retrieval] = []
        for number, (layer, group) in enumerate(zip(self.upper_layers, group_of, strict=True)):
            if number:
                hidden_states = inputs.keep(hidden_states)
            if memory is not None and group == len(retrieved):  # the group's first layer
                retriever: Retriever | FixedRetriever = self.retrievers[group]  # type: ignore[assignment]
                gumbel = self.training and self.config.gumbel_noise
                retrieved.append(memory.retrieve(group, retriever, hidden_states, gumbel))
            blocks, kept = (upper.block_index, upper.block_inverse), None
            if number == len(self.upper_layers) - 1:
                blocks, kept = (upper.output_block_index, upper.output_block_inverse), upper.output_index
            # As tensors, one by one: reentrant checkpointing sees none inside of anything.
            chunks: tuple[Tensor | Retrieval, ...] = ()
            if retrieved:
                chunks = (retrieved[-1],) if isinstance(retrieved[-1], Retrieval) else retrieved[-1]
            hidden_states = layer(hidden_states, *blocks, states[number], kept, *chunks)
        if not self.upper_layers:
            hidden_states = hidden_states.flatten(0, 1)[upper.output_index]
        memories = [one.wait() if isinstance(one, Retrieval) else one for one in retrieved]
        return hidden_states, memories

    def _remember(
        self,
        given: Tensor,
        hidden_states: Tensor,
        layout: ChunkLayout,
        cache: DRTCache | None,
        guided: GuidedChunks | None,
    ) -> ChunkMemory:
        """Encode the chunks that close in this pass and add them to the memory."""
        source = hidden_states
        if layout.carried:
            assert cache is not None
            assert cache.open_states is not None
            source = torch.cat([cache.open_states, hidden_states], 1)
        flat = source.flatten(0, 1)
        tokens, keys_out = flat[layout.encoder_index], hidden_states.flatten(0, 1)[layout.landmark_index]
        if cache is not None:
            cache.open_states = flat[layout.open_index]
        encoded, landmarks = self.chunk_encoder(
            tokens, keys_out, None if layout.full else layout.chunk_lengths
        )
        _, head_dim = self.config.key_value_shape
        keys = self.chunk_k_proj(encoded).unflatten(-1, (-1, head_dim))
        values = self.chunk_v_proj(encoded).unflatten(-1, (-1, head_dim))
        if isinstance(self.retrievers[0], FixedRetriever):
            ids = self._chunk_ids(given, layout, cache)
            landmarks = self.retrievers[0].encode(ids, layout.chunk_lengths)
        return ChunkMemory(keys, values, landmarks, layout, cache, guided)

    def _chunk_ids(self, given: Tensor, layout: ChunkLayout, cache: DRTCache | None) -> Tensor:
        """(B, N, S) token ids of the chunks that close in this pass; keeps those of the open one in the cache."""
        if given.dim() != 2:
            raise ValueError(
                f"retriever {self.config.retriever!r} reads token ids: input_ids is required, got inputs_embeds"
            )
        ids = given.flatten()[layout.token_index]
        if layout.carried:
            if cache is None or cache.open_ids is None:
                raise ValueError("past_key_values was filled by a model without a fixed retriever")
            ids = torch.cat([cache.open_ids, ids], 1)
        flat = ids.flatten()
        if cache is not None:
            cache.open_ids = flat[layout.open_index]
        return flat[layout.encoder_index]


class DRTForCausalLM(DRTGenerationMixin, DRTPreTrainedModel):
    """DRT with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar in the base class)

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.model = DRTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DRTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        chunk_ends: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_retrieval: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        ended_rows: Tensor | None = None,
        last_chunk_ends: Tensor | None = None,
        retrieval_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> DRTCausalLMOutput:
        """As `DRTModel.forward`, with logits (B, L, V) and a loss.

        In a training step with ``labels`` the loss is made without logits, and ``logits`` is ``None``.

        Args:
            labels: (B, L) token ids aligned with ``input_ids`` (shifted inside), -100 where nothing is scored. A
                row's first token never is, whether padding lies before it or not.
            use_cache: as there, but with ``labels`` and no ``past_key_values`` the default is False.
            logits_to_keep: logits of the last n positions only (0: all), of the positions in a tensor (n,), or of each
                row's own positions (B, n). With n >= 1 and a cache, a long text is read at little more than the lower
                decoder's cost (see `DRTModel.forward`).
            ended_rows: (B,) bool, from `generate`: rows whose new token is padding.
            last_chunk_ends: (B, n) bool, from `generate`: ``chunk_ends`` of the last n tokens. An adapter may have put
                tokens before them.
        """
        check_arguments(self.config, output_attentions, position_ids, kwargs)
        source = input_ids if input_ids is not None else inputs_embeds
        labels = scored_labels(labels, source, attention_mask, position_ids, kwargs.get("ignore_index", -100))
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        if ended_rows is not None:
            attention_mask = ~ended_rows.unsqueeze(1)
        if last_chunk_ends is not None:
            assert source is not None  # by `generate`
            chunk_ends = pad(last_chunk_ends, (source.shape[1] - last_chunk_ends.shape[1], 0))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            chunk_ends=chunk_ends,
            use_cache=use_cache,
            output_retrieval=output_retrieval,
            states_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            retrieval_targets=retrieval_targets,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        logits = loss = None
        if labels is not None and needs_no_logits(self, self.lm_head, labels, logits_to_keep, **kwargs):
            loss = causal_loss(self.lm_head, states, labels, **kwargs)
        else:
            logits = self.lm_head(states)
        if labels is not None and logits is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return DRTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            chunk_indices=outputs.chunk_indices,
            chunk_weights=outputs.chunk_weights,
            retrieval_loss=outputs.retrieval_loss,
            retrieval_recall=outputs.retrieval_recall,
        )


def _retriever(config: DRTConfig) -> Retriever | FixedRetriever:
    if config.retriever == "learned":
        return Retriever(
            config.hidden_size, config.retrieval_top_k, config.rms_norm_eps, config.learned_temperature
        )
    return FIXED_RETRIEVERS[config.retriever](config.retrieval_top_k)
