"""Checks on what a user gives to a DRT model's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.models.common import inputs
from drt.models.common.columns import ReadColumns
from drt.models.common.inputs import NO_WHOLE_GRAPH, check_arguments, scored_labels
from drt.models.common.rows import NewTokens
from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.configuration_drt import DRTConfig

__all__ = ["check_arguments", "check_inputs", "scored_labels"]


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)
def check_inputs(
    config: DRTConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    chunk_ends: Tensor | None,
    past_key_values: DRTCache | None,
) -> NewTokens:
    """Check the inputs and say what the new columns are.

    Raises:
        ValueError: naming what was expected and what was given.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    past = ReadColumns()
    if past_key_values is not None and given is not None:
        open_lengths = getattr(past_key_values, "open_lengths", None)
        held_rows = None if open_lengths is None else len(open_lengths)
        inputs.check_cache(past_key_values, DRTCache, held_rows, given.shape[0])
        past = past_key_values.columns
    return inputs.check_inputs(
        config.vocab_size, input_ids, inputs_embeds, attention_mask, position_ids, chunk_ends, past
    )
