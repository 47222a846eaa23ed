"""Checks on what a user gives to a DRT model's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.configuration_drt import DRTConfig


@torch.compiler.disable
def check_inputs(
    config: DRTConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    chunk_ends: Tensor | None,
    past_key_values: DRTCache | None,
) -> Tensor | None:
    """Check the inputs and return the mask of the new tokens, or ``None`` when no row has padding.

    Raises:
        ValueError: naming what was got and what is wanted.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is wanted")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if given.dim() != (2 if input_ids is not None else 3) or 0 in given.shape[:2]:
        raise ValueError(
            f"the input must be (batch, length) tokens with both at least 1, got {tuple(given.shape)}"
        )
    shape = (given.shape[0], given.shape[1])
    if input_ids is not None:
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(f"token ids must lie in [0, {config.vocab_size}), got {lowest} to {highest}")
    if chunk_ends is not None and tuple(chunk_ends.shape) != shape:
        raise ValueError(
            f"chunk_ends must have the shape of the input, {shape}, got {tuple(chunk_ends.shape)}"
        )
    if past_key_values is not None:
        _check_cache(past_key_values, shape[0])
    return None if attention_mask is None else _new_part_of_mask(attention_mask, shape, past_key_values)


def check_labels(labels: Tensor | None, source: Tensor | None) -> None:
    """Check that labels, where there are any, have the shape (B, L) of the input."""
    if labels is not None and source is not None and labels.shape != source.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the input, {tuple(source.shape[:2])}, got {tuple(labels.shape)}"
        )


def _check_cache(cache: object, batch_size: int) -> None:
    if not isinstance(cache, DRTCache):
        raise ValueError(f"past_key_values must be a DRTCache, got {type(cache).__name__}")
    if cache.open_lengths is not None and len(cache.open_lengths) != batch_size:
        raise ValueError(f"past_key_values holds {len(cache.open_lengths)} rows, the input has {batch_size}")


def _new_part_of_mask(mask: Tensor, shape: tuple[int, int], cache: DRTCache | None) -> Tensor | None:
    past = 0 if cache is None else cache.seen_tokens
    lengths = (shape[1], past + shape[1])
    if mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] not in lengths:
        raise ValueError(
            f"attention_mask must be ({shape[0]}, {lengths[0]}) for the new tokens or ({shape[0]}, {lengths[1]}) for "
            f"all, got {tuple(mask.shape)}"
        )
    new = mask[:, -shape[1] :].cpu() != 0
    if bool((new[:, :-1] & ~new[:, 1:]).any()):
        raise ValueError(
            "attention_mask must be left padding (zeros, then ones), got a zero after a one. Text padded on the "
            "right needs no mask: later positions are never seen; set labels to -100 there."
        )
    return None if bool(new.all()) else new
