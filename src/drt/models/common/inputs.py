"""Checks on what a user gives to a model's forward."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.disable
def check_inputs(
    vocab_size: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    chunk_ends: Tensor | None,
    past: int,
) -> Tensor | None:
    """Check the inputs and return the mask of the new tokens, or ``None`` when no row has padding.

    Args:
        vocab_size: entries of the embedding.
        input_ids: (B, L), or ``None``.
        inputs_embeds: (B, L, H), or ``None``.
        attention_mask: (B, L) or (B, past + L).
        chunk_ends: (B, L).
        past: columns of input that a cache has seen.

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
    if input_ids is not None and input_ids.device.type == "cpu":  # elsewhere looking would stall the device
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"token ids must lie in [0, {vocab_size}), got {lowest} to {highest}")
    if chunk_ends is not None and tuple(chunk_ends.shape) != shape:
        raise ValueError(
            f"chunk_ends must have the shape of the input, {shape}, got {tuple(chunk_ends.shape)}"
        )
    return None if attention_mask is None else _new_part_of_mask(attention_mask, shape, past)


def check_labels(labels: Tensor | None, source: Tensor | None) -> None:
    """Check that labels, where there are any, have the shape (B, L) of the input."""
    if labels is not None and source is not None and labels.shape != source.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the input, {tuple(source.shape[:2])}, got {tuple(labels.shape)}"
        )


def check_cache(cache: object, wanted: type, held_rows: int | None, batch_size: int) -> None:
    """Check a cache's class, and that it holds as many rows as the input has (``None``: it holds nothing yet)."""
    if not isinstance(cache, wanted):
        raise ValueError(f"past_key_values must be a {wanted.__name__}, got {type(cache).__name__}")
    if held_rows is not None and held_rows != batch_size:
        raise ValueError(f"past_key_values holds {held_rows} rows, the input has {batch_size}")


def _new_part_of_mask(mask: Tensor, shape: tuple[int, int], past: int) -> Tensor | None:
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
