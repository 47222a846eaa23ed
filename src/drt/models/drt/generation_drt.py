"""What `generate` must know of DRT: where a prompt ends, its last chunk closes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from drt.models.common.generation import OwnCacheGenerationMixin
from drt.models.drt.cache_drt import DRTCache


class DRTGenerationMixin(OwnCacheGenerationMixin):
    """`generate` of `DRTForCausalLM`."""

    cache_class = DRTCache
    config: Any  # DRTConfig, as the model's base class says

    def make_cache(self) -> DRTCache:
        return DRTCache(self.config)

    def generation_defaults(self) -> dict[str, Any]:
        return super().generation_defaults() | {"close_prompt": self.config.close_prompt}

    def closes_prompt(self, wanted: bool | None = None, generation_config: Any = None) -> bool:
        said = getattr(generation_config or self.generation_config, "close_prompt", None)
        # A checkpoint's generation_config.json may not say.
        return next(x for x in (wanted, said, self.config.close_prompt) if x is not None)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        """Remember where the prompt ends: its last chunk closes there, unless it only goes on with an answer."""
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        mask = model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        given = input_ids.shape[1] if embeds is None else embeds.shape[1]
        seen = generation_config._mask_length if mask is None else mask.shape[1]
        whole = given if seen == given else past + given
        if whole <= past:
            raise ValueError(
                f"the prompt must go on after the {past} tokens that past_key_values holds, got {whole} tokens in all"
            )
        closes = self.closes_prompt(model_kwargs.pop("close_prompt", None), generation_config)
        goes_on = cache is not None and cache.answered_tokens == past and whole == past + 1
        if closes and not goes_on:
            model_kwargs["prompt_length"] = whole
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        close_prompt: bool | None = None,
        prompt_length: int | None = None,
        chunk_ends: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice the inputs, and close the open chunk at the end of the prompt (and where ``chunk_ends`` says).

        Args:
            input_ids: (B, L), all of the text.
            inputs_embeds: (B, L, H), an argument of `generate`: the prompt.
            close_prompt: an argument of `generate`: close the open chunk at the end of the prompt. Default: what
                ``generation_config`` says, else ``config.close_prompt``. A call on the cache of the last call that
                brings nothing but the last generated token goes on with the answer, and closes nothing.
            prompt_length: columns of the prompt that closes its chunk.
            chunk_ends: (B, L) bool, an argument of `generate`: further ends of chunks in the prompt.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        cache = inputs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        ends = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if chunk_ends is not None:
            given = chunk_ends[:, start : start + tokens.shape[1]]
            ends[:, : given.shape[1]] = given
        if prompt_length is not None and start < prompt_length <= start + tokens.shape[1]:
            ends[:, prompt_length - 1 - start] = True
        inputs["last_chunk_ends"] = ends if bool(ends.any()) else None
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Note in the cache that what follows is an answer."""
        cache = outputs.get("past_key_values")
        if cache is not None:
            cache.answered_tokens = cache.seen_tokens
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
