"""The decoding state of DRT: windows of keys and values, the open chunk, current selections and the chunk memory."""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from drt.errors import DRTError
from drt.layers.grouped_cross_attention import RetrievedMemory
from drt.memory import Archive, ArchiveDescription, ArchiveWriter, ChunkStore, DeviceStore
from drt.models.common.cache import WindowCacheLayer
from drt.models.common.columns import ReadColumns
from drt.models.common.devices import input_device
from drt.models.common.rows import NewTokens
from drt.models.drt.archive_check import check_archive
from drt.models.drt.chunk_layout import ChunkLayout
from drt.models.drt.configuration_drt import DRTConfig

SAVED_AT_ONCE = 1024  # chunks


class DRTCache(Cache):
    """What a DRT model keeps between passes; give it to ``forward`` or ``generate`` as ``past_key_values``.

    Memory in use: the chunk memory grows by one set of keys and values a token, whatever the model's depth;
    everything else is constant in the length.

    Args:
        config: the model's configuration.
        store: the chunk memory; ``None`` keeps it in pages on the model's device.
    """

    layers: list[WindowCacheLayer]  # type: ignore[assignment]  # narrower than the base class's

    def __init__(self, config: DRTConfig, store: ChunkStore | None = None) -> None:
        super().__init__(
            layers=[WindowCacheLayer(config.sliding_window) for _ in range(config.num_hidden_layers)]
        )
        self.num_lower_layers = config.num_lower_layers
        self.store: ChunkStore = DeviceStore() if store is None else store
        self.columns = ReadColumns()
        # `seen_tokens` when `generate` chose its last token, which is unread
        self.answered_tokens: int | None = None
        self.open_states: Tensor | None = (
            None  # (B, S, H) lower-decoder outputs of the open chunk, first slots first
        )
        self.open_ids: Tensor | None = (
            None  # (B, S) token ids of the open chunk, where a fixed retriever reads them
        )
        self.open_lengths: Tensor | None = None  # (B,) on the CPU
        self.closed_counts: Tensor | None = None  # (B,) on the CPU: chunks closed so far
        self.selections: list[RetrievedMemory | None] = [None] * len(config.layers_per_group)
        self.archive: Archive | None = None  # where the chunk memory was opened from

    @property
    def seen_tokens(self) -> int:
        """Columns of input read so far, left padding included."""
        return self.columns.length

    @classmethod
    def open(cls, archive: Archive | Path | str, model: PreTrainedModel) -> Self:
        """Go on where the text of an archive ends: the next tokens follow its last.

        ``seen_tokens`` begins at 0: `generate` wants the new tokens only. What is read stays in memory, and any number
        of rows may be made of the one with `select_rows`, unless the archive was opened for writing.

        Args:
            archive: open, or its folder.
            model: the one that made it.

        Raises:
            DRTError: made by another model, or not finished; what `Archive.open` raises.
        """
        archive = archive if isinstance(archive, Archive) else Archive.open(archive)
        check_archive(archive, model)
        if not archive.finished and isinstance(archive, ArchiveWriter):
            raise DRTError(f"{archive.path} is not finished: finish its build before asking")
        cache = cls(cast(DRTConfig, model.config), archive.store())
        cache.archive = archive
        cache.load_state(archive.state(), input_device(model), model.dtype)
        return cache

    def save(self, path: Path | str | None = None, description: ArchiveDescription | None = None) -> None:
        """Keep everything read so far in an archive.

        Args:
            path: folder of a new archive. ``None``: the archive that the cache was opened from, for writing.
            description: of the new archive, see `describe_archive`; chunks are rounded to its dtype. A text is not
                kept: the cache does not know it.

        Raises:
            ValueError: more than one row, nothing read, or arguments that do not fit how the cache was opened.
            DRTError: what writing raises.
        """
        if self._batch_size() != 1:
            raise ValueError(
                f"an archive holds one row, this cache {self._batch_size()}: choose one with select_rows"
            )
        if path is None:
            if not isinstance(self.archive, ArchiveWriter):
                raise ValueError(
                    "a path is required: this cache was not opened from an archive opened for writing"
                )
            self.archive.commit(self.state(), finished=True)
            return
        if description is None:
            raise ValueError("a new archive wants a description; see describe_archive")
        with ArchiveWriter.create(path, description) as writer:
            writer.begin_document("")
            store, count = writer.store(), int(self.store.counts[0]) if len(self.store.counts) else 0
            for first in range(0, count, SAVED_AT_ONCE):
                chunks = torch.arange(first, min(first + SAVED_AT_ONCE, count), device="cpu").view(1, 1, -1)
                keys, values, lengths = (part[:, 0] for part in self.store.gather(chunks.to(self._device())))
                landmarks = self.store.landmark_blocks().read(chunks.to(self._device()))[:, 0]
                store.append(keys, values, landmarks, lengths, torch.tensor([chunks.shape[2]], device="cpu"))
            writer.end_document()
            writer.commit(self.state(), finished=True)

    def state(self) -> dict[str, Tensor]:
        """Everything but the chunk memory, of one row, as named tensors on the CPU."""
        tensors: dict[str, Tensor | None] = {
            "open_states": self.open_states,
            "open_ids": self.open_ids,
            "open_lengths": self.open_lengths,
            "closed_counts": self.closed_counts,
        }
        for number, layer in enumerate(self.layers):
            if layer.keys is not None and layer.values is not None:
                first = 0 if layer.held is None else layer.keys.shape[1] - int(layer.held[0])
                tensors |= {f"layer.{number}.keys": layer.keys[:, first:]}
                tensors |= {f"layer.{number}.values": layer.values[:, first:]}
        for group, selection in enumerate(self.selections):
            if selection is not None:
                tensors |= {f"selection.{group}.{name}": x for name, x in selection._asdict().items()}
        return {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}

    def load_state(self, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Take what `state` gave, of any device and precision."""

        def place(name: str) -> Tensor:
            return state[name].to(device, dtype if state[name].is_floating_point() else None)

        self.open_states = place("open_states") if "open_states" in state else None
        self.open_ids = place("open_ids") if "open_ids" in state else None
        self.open_lengths, self.closed_counts = state.get("open_lengths"), state.get("closed_counts")
        for number, layer in enumerate(self.layers):
            layer.forget()
            if f"layer.{number}.keys" in state:
                keys, values = place(f"layer.{number}.keys"), place(f"layer.{number}.values")
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
        for group in range(len(self.selections)):
            if f"selection.{group}.keys" in state:
                names = [f"selection.{group}.{name}" for name in RetrievedMemory._fields]
                # the weights stay in float32
                tensors = [*map(place, names[:-1]), state[names[-1]].to(device)]
                self.selections[group] = RetrievedMemory._make(tensors)

    def begin_text(self) -> None:
        """The next token begins another text: it sees none of the last one but by retrieval."""
        for layer in self.layers:
            layer.forget()
        self.answered_tokens = None
        self.open_states = self.open_ids = self.open_lengths = None
        self.selections = [None] * len(self.selections)

    def drop_upper(self) -> None:
        """Forget the upper decoder's state; a pass over as much as it reaches back makes it anew."""
        for layer in self.layers[self.num_lower_layers :]:
            layer.forget()
        self.selections = [None] * len(self.selections)

    def begin(self, layout: ChunkLayout) -> None:
        """Tell the window layers how long each row of the coming pass is."""
        lower, upper = (_unless_full(part.row_lengths) for part in (layout, layout.upper))
        for number, layer in enumerate(self.layers):
            layer.row_lengths = lower if number < self.num_lower_layers else upper

    def finish(self, layout: ChunkLayout, new: NewTokens) -> None:
        """Count what the pass has read."""
        self.columns.add(layout.token_position.shape[1], new.mask)
        self.open_lengths = layout.open_lengths
        closed = layout.closed_counts
        self.closed_counts = closed if self.closed_counts is None else self.closed_counts + closed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input read so far, left padding included; this is what ``generate`` slices prompts by."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length + self.seen_tokens, 0

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes what row ``rows[b]`` was; rows: (B',) int64."""
        for layer in self.layers:
            layer.select_rows(rows)
        self.store.select_rows(rows)
        self.columns.select_rows(rows)
        if self.open_states is not None:
            self.open_states = self.open_states[rows]
        if self.open_ids is not None:
            self.open_ids = self.open_ids[rows]
        if self.open_lengths is not None:
            self.open_lengths = self.open_lengths[rows.cpu()]
        if self.closed_counts is not None:
            self.closed_counts = self.closed_counts[rows.cpu()]
        self.selections = [
            None if held is None else RetrievedMemory(*(tensor[rows] for tensor in held))
            for held in self.selections
        ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues hypothesis ``beam_idx[b]``."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, in place, without copying the chunk memory."""
        self.select_rows(torch.arange(self._batch_size(), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.select_rows(indices)

    def crop(self, max_length: int) -> None:
        """A chunk memory cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a DRTCache cannot be cropped (asked for {max_length}): closed chunks cannot be reopened"
        )

    def reset(self) -> None:
        """Forget everything; the next pass starts a new text.

        Raises:
            ValueError: the chunk memory is an archive that is written to.
        """
        self.store.clear()
        for layer in self.layers:
            layer.forget()
        self.columns = ReadColumns()
        self.answered_tokens = None
        self.open_states = self.open_ids = self.open_lengths = self.closed_counts = None
        self.selections = [None] * len(self.selections)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.open_states is None else self.open_states.device

    def _batch_size(self) -> int:
        return 0 if self.open_lengths is None else len(self.open_lengths)


def _unless_full(row_lengths: Tensor) -> Tensor | None:
    width = max(int(row_lengths.max()), 1)  # of the pass, also where it holds nothing but padding
    return row_lengths if bool((row_lengths != width).any()) else None
