"""Ragged rows: the tokens of each row, or of each document in it, packed to slot 0; padding only behind their end."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class NewTokens(NamedTuple):
    """What the columns of one pass are, as `check_inputs` finds it.

    Attributes:
        mask: (B, L) bool on the CPU, False at padding; ``None``: no padding.
        starts: (B, L) bool on the CPU, True where a row's next document begins; ``None``: a row is one document.
        pads_right: some row has padding behind its tokens.
    """

    mask: Tensor | None = None
    starts: Tensor | None = None
    pads_right: bool = False

    def wants_cache(self, use_cache: bool | None, held: bool | None, default: bool) -> bool:
        """Whether the pass keeps a state to go on from.

        Args:
            use_cache: what the caller said.
            held: whether the cache that is given holds a text; ``None``: none is given.
            default: what the configuration says.

        Raises:
            ValueError: what was asked for cannot be.
        """
        ends_in_step = self.starts is None and not self.pads_right
        if use_cache is None:
            use_cache = held is not None or (default and ends_in_step and not torch.is_grad_enabled())
        if held and not use_cache:
            raise ValueError("use_cache=False cannot continue from past_key_values that hold a text")
        if use_cache and self.pads_right:
            raise ValueError(
                "with a cache attention_mask must be left padding (zeros, then ones), got a zero after a one: what "
                'follows would not go on where the text ends. Pad on the left (tokenizer.padding_side = "left"), or '
                "pass use_cache=False."
            )
        if use_cache and self.starts is not None:
            raise ValueError(
                "with a cache a row must be one document, got position_ids that begin again at 0: pass use_cache=False"
            )
        return use_cache


class PackedRows(NamedTuple):
    """Where the tokens of one pass lie, one row a document. Without padding nothing moves, every field is ``None``.

    Causality makes the padding behind a row's end harmless, so no attention needs a mask for it.

    Attributes:
        lengths: (R,) tokens of each document (on the CPU); R = B where a row is one document.
        token_index: (R, P) flat index into the (B, L) input of each packed position; anything at padding.
        output_index: (B, L) flat index of each input column's packed position; anything at padding.
    """

    lengths: Tensor | None
    token_index: Tensor | None
    output_index: Tensor | None

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) as given to (R, P, ...) packed."""
        return tensor if self.token_index is None else tensor.flatten(0, 1)[self.token_index]

    def unpack(self, tensor: Tensor) -> Tensor:
        """(R, P, ...) packed to (B, L, ...) as given."""
        return tensor if self.output_index is None else tensor.flatten(0, 1)[self.output_index]

    def mask(self) -> Tensor | None:
        """(R, P) bool on the CPU: the packed positions that are tokens."""
        if self.lengths is None or self.token_index is None:
            return None
        return torch.arange(self.token_index.shape[1], device="cpu") < self.lengths.unsqueeze(1)


class Slots(Protocol):
    """Where tokens and landmarks lie in the rows of a model that puts landmarks between the tokens."""

    @property
    def token_position(self) -> Tensor: ...

    @property
    def token_index(self) -> Tensor: ...

    @property
    def is_landmark(self) -> Tensor: ...


class LayerInputs:
    """What each layer of a pass reads, (B, L, H) at the tokens: ``output_hidden_states``.

    Args:
        wanted: False: nothing is kept.
        rows: where the tokens lie.
        slots: where they lie among landmarks, if there are any.
    """

    def __init__(self, wanted: bool, rows: PackedRows, slots: Slots | None = None) -> None:
        self.wanted = wanted
        self.rows = rows
        self.slots = slots
        self.kept: list[Tensor] = []

    def keep(self, states: Tensor) -> Tensor:
        """Keep a layer's input, (R, P, H); return what the layer reads: the same, made of what is kept.

        So gradients and hooks on what is kept are those of the layer's input, and not of a copy beside it.
        """
        if not self.wanted:
            return states
        slots = self.slots
        tokens = states if slots is None else states.flatten(0, 1)[slots.token_position.to(states.device)]
        self.kept.append(self.rows.unpack(tokens))
        tokens = self.rows.pack(self.kept[-1])
        if slots is None:
            return tokens
        return torch.where(slots.is_landmark.unsqueeze(-1), states, tokens.flatten(0, 1)[slots.token_index])

    def output(self, last: Tensor) -> tuple[Tensor, ...] | None:
        """All hidden states of the pass, ``last`` what the head reads; ``None`` where they are not wanted."""
        return (*self.kept, last) if self.wanted else None


def keep_columns(tensor: Tensor, kept: int | Tensor | None) -> Tensor:
    """Columns of (B, L, ...): the last ``kept``, those in a tensor (n,), each row's own (B, n), or all for ``None``."""
    if isinstance(kept, Tensor) and kept.dim() == 2:
        return tensor[torch.arange(len(tensor), device=tensor.device).unsqueeze(1), kept.to(tensor.device)]
    return tensor[:, kept if isinstance(kept, Tensor) else slice(None if kept is None else -kept, None)]


@torch.compiler.disable
def pack_rows(new: NewTokens, shape: tuple[int, int], device: torch.device) -> PackedRows:
    """Lay out the rows of a ragged batch.

    Args:
        new: what the columns are.
        shape: (B, L) of the input.
        device: where the indices shall lie.
    """
    if new.mask is None and new.starts is None:
        return PackedRows(None, None, None)
    length = shape[1]
    is_token = torch.ones(shape, dtype=torch.bool, device="cpu") if new.mask is None else new.mask
    begins = is_token & (is_token.cumsum(1) == 1)
    if new.starts is not None:
        begins = begins | new.starts
    documents = begins.sum(1).clamp_min(1)  # a row without a token is an empty one
    number = begins.cumsum(1) - 1 + (documents.cumsum(0) - documents).unsqueeze(1)
    row, column = is_token.nonzero(as_tuple=True)
    document = number[row, column]
    lengths = torch.bincount(document, minlength=int(documents.sum()))
    offset = torch.arange(len(row), device="cpu") - (lengths.cumsum(0) - lengths)[document]
    packed = max(int(lengths.max()), 1)
    token_index = torch.zeros(len(lengths), packed, dtype=torch.long, device="cpu")
    token_index[document, offset] = row * length + column
    output_index = torch.zeros(shape, dtype=torch.long, device="cpu")
    output_index[row, column] = document * packed + offset
    return PackedRows(lengths, token_index.to(device), output_index.to(device))
