"""What the baselines share with the library's machinery: flags, initial weights, the head, generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from drt.models.common.cache import DecoderCache
from drt.models.common.columns import ReadColumns
from drt.models.common.configuration import DecoderConfig
from drt.models.common.generation import OwnCacheGenerationMixin
from drt.models.common.inputs import check_arguments, check_cache, check_inputs, scored_labels
from drt.models.common.loss import causal_loss, needs_no_logits
from drt.models.common.packaged import PackagedCode
from drt.models.common.rows import LayerInputs, NewTokens, PackedRows, keep_columns, pack_rows
from drt.ops.window_attention import alibi_slopes


class Pass(NamedTuple):
    """What a forward pass begins with: packed ids or embeddings, what the columns are, where they lie, the cache."""

    source: Tensor
    new: NewTokens
    rows: PackedRows
    cache: DecoderCache | None


class DecoderPreTrainedModel(PackagedCode, PreTrainedModel):
    """Base of the baselines' models. A subclass names its configuration and its layers, and makes its cache."""

    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The base class makes this an attribute of each instance, so ClassVar would be wrong.
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # a DecoderCache cannot be rolled back: assisted decoding must refuse

    def make_cache(self) -> DecoderCache:
        """An empty decoding state."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        slopes = getattr(module, "alibi_slopes", None)
        if isinstance(slopes, Tensor):
            init.copy_(slopes, alibi_slopes(len(slopes)))

    def begin_pass(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: DecoderCache | None,
        inputs_embeds: Tensor | None,
        chunk_ends: Tensor | None,
        use_cache: bool | None,
    ) -> Pass:
        """Check the inputs, pack the rows, choose the cache.

        Raises:
            ValueError: naming what was expected and what was given.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        held = None
        if past_key_values is not None:
            held_rows = getattr(past_key_values, "held_rows", None)
            check_cache(past_key_values, DecoderCache, held_rows, 0 if source is None else source.shape[0])
            held = past_key_values.seen_tokens > 0
        past = ReadColumns() if past_key_values is None else past_key_values.columns
        new = check_inputs(
            self.config.vocab_size, input_ids, inputs_embeds, attention_mask, position_ids, chunk_ends, past
        )
        assert source is not None  # checked
        rows = pack_rows(new, (source.shape[0], source.shape[1]), source.device)
        cache = None
        if new.wants_cache(use_cache, held, self.config.use_cache):
            cache = self.make_cache() if past_key_values is None else past_key_values
            cache.begin(rows)
        return Pass(rows.pack(source), new, rows, cache)


class StackModel(DecoderPreTrainedModel):
    """Token ids to hidden states: ``embed_tokens``, ``layers`` that take (B, P, H) and a state, ``norm``."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

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
        """Run the stack over new tokens; arguments as in `DecoderGenerationMixin.forward`."""
        check_arguments(self.config, output_attentions, position_ids, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        source, new, rows, cache = self.begin_pass(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, chunk_ends, use_cache
        )
        hidden_states = self.embed_tokens(source) if input_ids is not None else source
        states = [None] * len(self.layers) if cache is None else cache.layers
        inputs = LayerInputs(bool(output_hidden_states), rows)
        for layer, state in zip(self.layers, states, strict=True):
            hidden_states = layer(inputs.keep(hidden_states), state)
        hidden_states = rows.unpack(self.norm(hidden_states))
        if cache is not None:
            cache.finish(hidden_states, new)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=inputs.output(hidden_states),
        )


class DecoderGenerationMixin(OwnCacheGenerationMixin):
    """The language-modelling head of a baseline: ``self.model`` to hidden states, ``self.lm_head`` to logits."""

    cache_class = DecoderCache
    model: DecoderPreTrainedModel
    vocab_size: int
    lm_head: nn.Linear

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        chunk_ends: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        ended_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids to logits (B, L, V) and a loss.

        In a training step with ``labels`` the loss is made without logits, and ``logits`` is ``None``.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) or (B, past + L), zeros at padding: before a row's tokens, or without a cache behind
                them too. What stands at padding in the output means nothing. For the columns that
                ``past_key_values`` holds it must say what it said when they were read.
            position_ids: (B, L), not needed: positions follow from the mask and the cache. Where they begin again at 0
                inside a row another document begins, which sees nothing of the one before (packed rows, without a
                cache; each is computed as a row of its own, padded to the longest).
            past_key_values: the state to continue from.
            inputs_embeds: (B, L, H) instead of ``input_ids``.
            labels: (B, L) token ids aligned with ``input_ids`` (shifted inside), -100 where nothing is scored. A
                row's first token never is, whether padding lies before it or not.
            chunk_ends: (B, L), accepted so that a baseline trains on the same batches as DRT; not used.
            use_cache: return a state to continue from. Default: whether ``past_key_values`` is given, or
                ``config.use_cache`` where there are no ``labels``, no gradient is recorded and every row is one
                document without padding behind it.
            logits_to_keep: logits of the last n positions only (0: all), of the positions in a tensor (n,), or of each
                row's own (B, n).
            output_hidden_states: also return (B, L, H) each: the embeddings, what every layer gives at the tokens, and
                at last what the head reads. Default: ``config.output_hidden_states``.
            output_attentions: refused: attention weights are made in blocks and never held.
            ended_rows: (B,) bool, from `generate`: rows whose new token is padding.
            kwargs: what else the library hands to models; what says something that is not heeded is refused.

        Raises:
            ValueError: for input that cannot be laid out; the message names what was expected and what was given.
        """
        check_arguments(self.model.config, output_attentions, position_ids, kwargs)
        source = input_ids if input_ids is not None else inputs_embeds
        labels = scored_labels(labels, source, attention_mask, position_ids, kwargs.get("ignore_index", -100))
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        if ended_rows is not None:
            attention_mask = ~ended_rows.unsqueeze(1)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            chunk_ends=chunk_ends,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        logits = loss = None
        if labels is not None and needs_no_logits(self, self.lm_head, labels, logits_to_keep, **kwargs):  # type: ignore[arg-type]
            loss = causal_loss(self.lm_head, states, labels, **kwargs)
        else:
            logits = self.lm_head(keep_columns(states, logits_to_keep))
        if labels is not None and logits is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]  # of PreTrainedModel
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def make_cache(self) -> DecoderCache:
        return self.model.make_cache()
