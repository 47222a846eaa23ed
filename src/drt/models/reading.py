"""Read a long text in segments, and continue it: what commands, evaluation and training's validation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel

from drt.models.common.devices import input_device
from drt.models.drt import DRTForCausalLM
from drt.models.drt.chunk_layout import upper_reach


class Continuation(NamedTuple):
    """What a prompt was continued with: `token_ids` (1, n) and the `logits` (1, n, V) they were chosen by."""

    token_ids: Tensor
    logits: Tensor


@torch.no_grad()
def read_text(
    model: PreTrainedModel,
    input_ids: Tensor,
    segment_size: int,
    cache: Cache | None = None,
    on_segment: Callable[[int], None] | None = None,
) -> Cache | None:
    """Read tokens into a model's cache, a segment at a time, so that memory is bounded by a segment.

    Of a DRT model only the end of the text runs through the upper decoder (`upper_reach`): what is remembered of the
    rest comes from below it, and nothing before that end has to search the memory. The result is that of plain passes.

    Args:
        model: in eval mode.
        input_ids: (B, L) token ids, on any device; L may be 0.
        segment_size: tokens of each row in one forward pass, >= 1.
        cache: what was read before.
        on_segment: called with the number of tokens just read, those of all rows, after each segment.

    Returns:
        The cache; ``None`` where nothing was read.
    """
    head = 0
    if isinstance(model, DRTForCausalLM) and model.config.retrieval:
        head = max(input_ids.shape[1] - upper_reach(model.config, 1), 0)
        cache = cache if cache is not None or head == 0 else model.make_cache()
    for number, part in enumerate((input_ids[:, :head], input_ids[:, head:])):
        for segment in part.split(segment_size, dim=1):
            if segment.shape[1] == 0:  # a part of no tokens is split into one segment of none
                continue
            ids = segment.to(input_device(model)).long()
            if number == 0:
                model.model.remember(ids, cache)
            else:
                cache = model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).past_key_values
            if on_segment is not None:
                on_segment(segment.numel())
    return cache


@torch.no_grad()
def read_and_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    segment_size: int,
    on_segment: Callable[[int], None] | None = None,
) -> Continuation:
    """Read a prompt through the model's cache, a segment at a time, and continue it greedily.

    Reading in segments bounds the memory of one forward pass; the result is that of reading in one pass. All
    but the last token are read by plain forward passes, the last one by `generate`, which closes the prompt's
    last chunk itself.

    Args:
        model: a causal language model in eval mode (dropout or Gumbel noise would make the answer random).
        input_ids: (1, L) int64 prompt, L >= 1, on any device.
        max_new_tokens: how many tokens to generate at most (fewer if the model ends the text itself).
        segment_size: tokens in one forward pass, >= 1.
        on_segment: called with the number of tokens just read, after each segment; the numbers add up to L.

    Returns:
        The generated tokens without the prompt, n <= max_new_tokens, on the model's device.

    Raises:
        ValueError: a batch of more than one prompt, an empty prompt, segment_size < 1, max_new_tokens < 1, a model
            in training mode, or one that cannot generate.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (1, L) with L >= 1, got {tuple(input_ids.shape)}")
    if segment_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"segment_size and max_new_tokens must be >= 1, got {segment_size} and {max_new_tokens}"
        )
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"expected a model that can generate, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before reading")
    input_ids = input_ids.to(input_device(model))
    cache = read_text(model, input_ids[:, :-1], segment_size, on_segment=on_segment)
    generated = model.generate(  # type: ignore[misc]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    if on_segment is not None:
        on_segment(1)
    assert not isinstance(generated, Tensor)  # as return_dict_in_generate says
    assert generated.logits is not None
    return Continuation(generated.sequences[:, input_ids.shape[1] :], torch.stack(generated.logits, dim=1))
