"""Decoding state: layers that hold a window or everything, and the cache of the baselines; rows of any lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from drt.models.common.columns import ReadColumns
from drt.models.common.rows import NewTokens, PackedRows


class GrowingCacheLayer(CacheLayerMixin):
    """All keys and values of one layer, (B, capacity, h_kv, D), each row packed to slot 0."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Tensor | None = None  # (B,) on the CPU: positions held of each row
        self.row_lengths: Tensor | None = None  # (B,) new positions of each row, None while all rows agree

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.detach()[:, :0], value_states.detach()[:, :0]
        self.lengths = torch.zeros(key_states.shape[0], dtype=torch.long, device="cpu")
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take (B, L, h_kv, D); return everything held, (B, M, h_kv, D), M the longest row with L more.

        What lies behind a row's end is finite, no more.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.lengths is not None
        new = key_states.shape[1]
        needed = int(self.lengths.max()) + new
        if needed > self.keys.shape[1]:  # half as much again: few copies, and little room that stays empty
            more = needed + needed // 2 - self.keys.shape[1]
            with torch.inference_mode(False):  # else nothing could be written to it outside inference mode
                self.keys, self.values = (
                    torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)
                    for x in (self.keys, self.values)
                )
        slots = (self.lengths.unsqueeze(1) + torch.arange(new, device="cpu")).to(self.keys.device)
        rows = torch.arange(len(self.lengths), device=self.keys.device).unsqueeze(1)
        self.keys[rows, slots] = key_states.detach()
        self.values[rows, slots] = value_states.detach()
        self.lengths = self.lengths + (new if self.row_lengths is None else self.row_lengths)
        return self.keys[:, :needed], self.values[:, :needed]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return 0 if self.lengths is None else int(self.lengths.max())

    def get_max_length(self) -> int:
        return -1

    def select_rows(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None and self.lengths is not None:
            with torch.inference_mode(False):  # as in `update`
                self.keys, self.values = self.keys[rows], self.values[rows]
            self.lengths = self.lengths[rows.cpu()]


class WindowCacheLayer(CacheLayerMixin):
    """The last ``window - 1`` keys and values of one layer, (B, P, h_kv, D), aligned at the right."""

    is_compileable = False
    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.held: Tensor | None = None  # (B,) valid positions in each row, None while all rows agree
        self.row_lengths: Tensor | None = None  # (B,) new positions of each row, None while all rows agree

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :0], value_states[:, :0]
        self.is_initialized = True

    def update(  # type: ignore[override]  # a third result: only our layers read this cache
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take (B, L, h_kv, D); return held + new keys and values, and each row's first valid slot or None."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        held_slots = self.keys.shape[1]
        keys, values = torch.cat([self.keys, key_states], 1), torch.cat([self.values, value_states], 1)
        if self.row_lengths is None and self.held is None:
            keep = min(self.window - 1, keys.shape[1])
            self.keys, self.values = _last(keys, keep), _last(values, keep)
            return keys, values, None
        held = torch.full((keys.shape[0],), held_slots, device="cpu") if self.held is None else self.held
        new = torch.full_like(held, key_states.shape[1]) if self.row_lengths is None else self.row_lengths
        keep = min(self.window - 1, keys.shape[1])
        slots = held_slots + new.unsqueeze(1) - keep + torch.arange(keep, device="cpu")
        index = slots.clamp_min(0).to(keys.device)[..., None, None].expand(-1, -1, *keys.shape[2:])
        self.keys, self.values = keys.gather(1, index), values.gather(1, index)
        self.held = (held + new).clamp_max(keep)
        return keys, values, (held_slots - held).to(keys.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def get_max_length(self) -> int:
        return -1

    def forget(self) -> None:
        """Hold nothing."""
        self.keys = self.values = self.held = self.row_lengths = None
        self.is_initialized = False

    def select_rows(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self.held is not None:
            self.held = self.held[rows.cpu()]


class DecoderCache(Cache):
    """What a baseline keeps between passes; give it to ``forward`` or ``generate`` as ``past_key_values``.

    Args:
        make_layers: gives the empty state of each layer; besides the library's interface a layer has
            ``row_lengths`` and ``select_rows``.
    """

    layers: list[Any]

    def __init__(self, make_layers: Callable[[], list[Any]]) -> None:
        super().__init__(layers=make_layers())
        self.make_layers = make_layers
        self.columns = ReadColumns()
        self.held_rows: int | None = None

    @property
    def seen_tokens(self) -> int:
        """Columns of input read so far, left padding included."""
        return self.columns.length

    def begin(self, rows: PackedRows) -> None:
        """Tell the layers how long each row of the coming pass is."""
        for layer in self.layers:
            layer.row_lengths = rows.lengths

    def finish(self, output: Tensor, new: NewTokens) -> None:
        """Count what the pass has read; output: (B, L, H)."""
        self.held_rows = output.shape[0]
        self.columns.add(output.shape[1], new.mask)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input read so far, left padding included; this is what ``generate`` slices prompts by."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length + self.seen_tokens, 0

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes what row ``rows[b]`` was; rows: (B',) int64."""
        if self.held_rows is None:
            return
        for layer in self.layers:
            layer.select_rows(rows)
        self.columns.select_rows(rows)
        self.held_rows = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues hypothesis ``beam_idx[b]``."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.select_rows(torch.arange(self.held_rows or 0, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.select_rows(indices)

    def crop(self, max_length: int) -> None:
        """Not every baseline's state can be rolled back, so none is.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a DecoderCache cannot be cropped (asked for {max_length})")

    def reset(self) -> None:
        """Forget everything; the next pass starts a new text."""
        self.layers = self.make_layers()
        self.columns = ReadColumns()
        self.held_rows = None


def _last(tensor: Tensor, count: int) -> Tensor:
    """The last slots, cloned when they are a small part, so that a long pass's keys are not kept alive."""
    kept = tensor[:, tensor.shape[1] - count :]
    return kept.clone() if 2 * count < tensor.shape[1] else kept
