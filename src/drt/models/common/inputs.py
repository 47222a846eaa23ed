"""Checks on what a user gives to a model's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from drt.models.common.columns import ReadColumns
from drt.models.common.rows import NewTokens

NO_WHOLE_GRAPH = (
    "where chunks and rows lie is found on the CPU for every input: compile without fullgraph=True"
)
PACKED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "seq_idx",
)  # how collators tell other models what position_ids say too


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def check_inputs(
    vocab_size: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    chunk_ends: Tensor | None,
    past: ReadColumns,
) -> NewTokens:
    """Check the inputs and say what the new columns are.

    Args:
        vocab_size: entries of the embedding.
        input_ids: (B, L), or ``None``.
        inputs_embeds: (B, L, H), or ``None``.
        attention_mask: (B, L) or (B, past + L).
        position_ids: (B, L), (1, L) or (L,).
        chunk_ends: (B, L).
        past: columns of input that a cache has seen.

    Raises:
        ValueError: naming what was expected and what was given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
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
    mask = None if attention_mask is None else _new_part_of_mask(attention_mask, shape, past)
    starts = None if position_ids is None else _document_starts(position_ids, mask, shape, past)
    return NewTokens(mask, starts, mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()))


def check_arguments(
    config: PreTrainedConfig,
    output_attentions: bool | None,
    position_ids: Tensor | None,
    others: Mapping[str, Any],
) -> None:
    """Refuse arguments of the library's models that say something and would not be heeded, and graphs of the whole."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"torch.export and torch.jit.trace are not supported, torch.compile is; {NO_WHOLE_GRAPH}"
        )
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(
            "output_attentions=True cannot be had: attention weights are made in blocks and never held. Wanted: False"
        )
    for name in ("head_mask", "retrieval_targets"):  # the latter of DRT alone, which takes them before this
        if others.get(name) is not None:
            raise ValueError(f"{name} is not supported by {config.model_type} models, got one; expected None")
    packed = [name for name in PACKED if others.get(name) is not None]
    if packed and position_ids is None:
        raise ValueError(
            f"{', '.join(packed)} says where packed documents lie; expected position_ids that restart at 0 with each"
        )


def scored_labels(
    labels: Tensor | None,
    source: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor | None:
    """The labels that count, where there are any.

    A document's first token is predicted by nothing. Where padding lies before it, what stands there in the output
    comes of a position that has seen the token, and must not be scored against it; where another document does, it is
    the end of that.

    Args:
        labels: (B, L), not shifted.
        source: (B, L, ...) input.
        attention_mask: (B, L) or (B, past + L).
        position_ids: (B, L), (1, L) or (L,), 0 where a document begins.
        ignore_index: the label that does not count.

    Raises:
        ValueError: another shape than the input's.
    """
    if labels is None or source is None:
        return labels
    if labels.shape != source.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the input, {tuple(source.shape[:2])}, got {tuple(labels.shape)}"
        )
    if (
        position_ids is not None and position_ids.shape[-1] == labels.shape[1]
    ):  # others are refused by `check_inputs`
        labels = labels.masked_fill((position_ids == 0).to(labels.device), ignore_index)
    if attention_mask is None or attention_mask.dim() != 2:  # refused by `check_inputs`
        return labels
    is_padding = attention_mask[:, -labels.shape[1] :].to(labels.device) == 0
    return labels.masked_fill(pad(is_padding[:, :-1], (1, 0)), ignore_index)


def check_cache(cache: object, wanted: type, held_rows: int | None, batch_size: int) -> None:
    """Check a cache's class, and that it holds as many rows as the input has (``None``: it holds nothing yet)."""
    if not isinstance(cache, wanted):
        raise ValueError(f"past_key_values must be a {wanted.__name__}, got {type(cache).__name__}")
    if held_rows is not None and held_rows != batch_size:
        raise ValueError(f"past_key_values holds {held_rows} rows, the input has {batch_size}")


def _new_part_of_mask(mask: Tensor, shape: tuple[int, int], past: ReadColumns) -> Tensor | None:
    lengths = (shape[1], past.length + shape[1])
    if mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] not in lengths:
        raise ValueError(
            f"attention_mask must be ({shape[0]}, {lengths[0]}) for the new tokens or ({shape[0]}, {lengths[1]}) for "
            f"all, got {tuple(mask.shape)}"
        )
    ones = mask.cpu() != 0
    if ones.shape[1] > shape[1]:
        past.check(ones[:, : -shape[1]])
    new = ones[:, -shape[1] :]
    runs = (new.long().diff(dim=1) > 0).sum(1).add(new[:, 0])
    if bool(runs.gt(1).any()):
        raise ValueError(
            "attention_mask must be padding around one run of tokens (zeros, then ones, then zeros), got a zero "
            f"between ones in row {int(runs.argmax())}. Prompt tuning puts its tokens before the padding on a row's "
            "left: give it prompts of one length"
        )
    return None if bool(new.all()) else new


def _document_starts(
    position_ids: Tensor, mask: Tensor | None, shape: tuple[int, int], past: ReadColumns
) -> Tensor | None:
    """(B, L) bool on the CPU, where another document begins inside a row; ``None`` where none does."""
    positions = position_ids.cpu()
    positions = positions.unsqueeze(0) if positions.dim() == 1 else positions
    if positions.dim() != 2 or positions.shape[0] not in (1, shape[0]) or positions.shape[1] != shape[1]:
        raise ValueError(
            f"position_ids must have the shape of the input, {shape}, got {tuple(position_ids.shape)}"
        )
    positions = positions.expand(shape)
    is_token = torch.ones(shape, dtype=torch.bool, device="cpu") if mask is None else mask
    follows = is_token[:, 1:] & is_token[:, :-1]
    starts = torch.zeros(shape, dtype=torch.bool, device="cpu")
    starts[:, 1:] = follows & (positions[:, 1:] == 0)
    wrong = (follows & ~starts[:, 1:] & (positions.diff(dim=1) != 1)).nonzero()
    if len(wrong):
        row, column = (int(x) for x in wrong[0])
        before, after = positions[row, column : column + 2].tolist()
        raise ValueError(
            f"position_ids must go up by one, and begin again at 0 with another document, got {after} after {before} "
            f"in row {row}"
        )
    read = past.tokens().expand(shape[0])
    first = positions.gather(1, is_token.long().argmax(1, keepdim=True)).squeeze(1)
    goes_on = (first == read) | (first == past.length) | (read == 0) | ~is_token.any(1)
    if not bool(goes_on.all()):
        row = int((~goes_on).nonzero()[0])
        raise ValueError(
            f"position_ids must go on from the {int(read[row])} tokens that past_key_values holds of row {row}, got "
            f"{int(first[row])}"
        )
    return starts if bool(starts.any()) else None
