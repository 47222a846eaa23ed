"""What the baselines share with the library's machinery: flags, initial weights, the head, generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from drt.models.common.cache import DecoderCache
from drt.models.common.configuration import DecoderConfig
from drt.models.common.generation import OwnCacheGenerationMixin
from drt.models.common.inputs import check_cache, check_inputs, check_labels
from drt.models.common.loss import causal_loss, needs_no_logits
from drt.models.common.rows import PackedRows, pack_rows
from drt.ops.window_attention import alibi_slopes


class DecoderPreTrainedModel(PreTrainedModel):
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
        past_key_values: DecoderCache | None,
        inputs_embeds: Tensor | None,
        chunk_ends: Tensor | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, PackedRows, DecoderCache | None]:
        """Check the inputs; returns the packed ids or embeddings, where rows lie, and the cache to use, if any.

        Raises:
            ValueError: naming what was got and what is wanted.
        """
        past = 0
        if past_key_values is not None:
            given = input_ids if input_ids is not None else inputs_embeds
            rows_given = 0 if given is None else given.shape[0]
            held_rows = getattr(past_key_values, "held_rows", None)
            check_cache(past_key_values, DecoderCache, held_rows, rows_given)
            past = past_key_values.seen_tokens
        mask = check_inputs(
            self.config.vocab_size, input_ids, inputs_embeds, attention_mask, chunk_ends, past
        )
        source = input_ids if input_ids is not None else inputs_embeds
        assert source is not None  # checked
        rows = pack_rows(mask, source.device)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not torch.is_grad_enabled())
        if not use_cache:
            if past:
                raise ValueError("use_cache=False cannot continue from past_key_values that hold a text")
            return rows.pack(source), rows, None
        cache = self.make_cache() if past_key_values is None else past_key_values
        cache.begin(rows)
        return rows.pack(source), rows, cache


class DecoderGenerationMixin(OwnCacheGenerationMixin):
    """The language-modelling head of a baseline: ``self.model`` to hidden states, ``self.lm_head`` to logits."""

    cache_class = DecoderCache
    model: DecoderPreTrainedModel
    vocab_size: int
    lm_head: nn.Linear

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids to logits (B, L, V) and a loss.

        In a training step with ``labels`` the loss is made without logits, and ``logits`` is ``None``.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) or (B, past + L), zeros only at the left: left padding.
            position_ids: accepted and not needed: positions follow from the mask and the cache.
            past_key_values: the state to continue from.
            inputs_embeds: (B, L, H) instead of ``input_ids``.
            labels: (B, L) token ids aligned with ``input_ids`` (shifted inside), -100 where nothing is scored.
            chunk_ends: (B, L), accepted so that a baseline trains on the same batches as DRT; not used.
            use_cache: return a state to continue from. Default: whether ``past_key_values`` is given, or
                ``config.use_cache`` where there are no ``labels`` and no gradient is recorded.
            logits_to_keep: logits of the last n positions only (0: all), or of the positions in a tensor.

        Raises:
            ValueError: for input that cannot be laid out; the message names what was got and what is wanted.
        """
        check_labels(labels, input_ids if input_ids is not None else inputs_embeds)
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            chunk_ends=chunk_ends,
            use_cache=use_cache,
        )
        states = outputs.last_hidden_state
        logits = loss = None
        if labels is not None and needs_no_logits(self, self.lm_head, labels, logits_to_keep, **kwargs):  # type: ignore[arg-type]
            loss = causal_loss(self.lm_head, states, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(states[:, kept])
        if labels is not None and logits is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]  # of PreTrainedModel
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def make_cache(self) -> DecoderCache:
        return self.model.make_cache()
