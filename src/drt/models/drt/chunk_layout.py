"""Where tokens, landmarks and chunks lie: the integer bookkeeping of one forward pass.

The decoder works on *compact* rows: the real tokens of a row packed to slot 0, each closed chunk's landmark right
after its last token, padding only behind the row's end, where causality makes it harmless.  Chunk boundaries are
those of the specification: a chunk closes when it holds ``chunk_size`` tokens, or earlier where the caller says so.
Everything is computed on the CPU from a mask and a few counts; the model only gathers by the indices found here.

The chunk memory is made from the lower decoder alone, so the upper decoder need not run over all of a text that is
only being read: what predicts the next token, and what later passes need of it, reaches back `upper_reach` positions
and no further. `UpperLayout` is the part of the layout that shrinks with that. (YOCO, arXiv 2405.05254, lets the
prefill exit early for the same reason; there the upper half has no state of its own.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from drt.models.common.rows import keep_columns
from drt.models.drt.configuration_drt import DRTConfig

BLOCK_MULTIPLE = 16  # query slots of a block, but for a block of one


@dataclass(frozen=True)
class UpperLayout:
    """The positions that the upper decoder runs over: all compact ones, or the last M of each row.

    "Flat" indices address a (B * M) first dimension, but for ``index``.

    Attributes:
        index: (B, M) flat compact index of each position; ``None``: all of them, M = compact_length.
        row_lengths: (B,) positions of each row (on the CPU).
        output_index: (B, n) flat index of the position whose hidden state predicts what follows each of the last n
            input tokens, or follows the tokens of n columns; n = L unless fewer are required.
        closed_counts: (B,) landmarks among the positions (on the CPU); N is the largest.
        skipped_chunks: (B,) chunks that close in this pass before the first position (on the CPU).
        landmark_index: (B, N) flat index of each of those landmarks.
        chunks_before: (B, N) chunks that close in this pass before each of those landmarks' own, -1 where a row has
            fewer landmarks than N.
        block_size: query slots per selection, the longest run of positions that share one.
        block_index: (B, (N + 1) * block_size) flat index of each query slot, -1 for an empty slot. Block 0 is served
            by the selection carried from earlier passes, block n + 1 by that of landmark n.
        block_inverse: (B, M) flat index of each position into (B, (N + 1) * block_size), -1 for padding.
        output_block_index: like ``block_index``, but of the (B, n) positions in ``output_index``, in as short blocks as
            hold them.
        output_block_inverse: (B, n), its inverse.
    """

    index: Tensor | None
    row_lengths: Tensor
    output_index: Tensor
    closed_counts: Tensor
    skipped_chunks: Tensor
    landmark_index: Tensor
    chunks_before: Tensor
    block_size: int
    block_index: Tensor
    block_inverse: Tensor
    output_block_index: Tensor
    output_block_inverse: Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Indices of one forward pass over B rows. "Flat" indices address a (B * length) first dimension.

    Attributes:
        row_lengths: (B,) compact positions of each row (on the CPU).
        compact_length: longest row, landmarks included; at least 1.
        token_position: (B, L) flat compact index of each input token (on the CPU); anything at padding.
        token_index: (B, compact_length) flat index into the (B, L) input; anything at landmarks and padding.
        is_landmark: (B, compact_length) bool.
        closed_counts: (B,) chunks that close in this pass (on the CPU); N is the largest.
        landmark_index: (B, N) flat compact index of each closed chunk's landmark.
        chunk_lengths: (B, N) tokens of each closed chunk, 0 where a row closes fewer than N.
        encoder_index: (B, N, chunk_size) flat index of each chunk's tokens into (B, carried + compact_length), where
            ``carried`` slots hold the open chunk's tokens of earlier passes.
        carried: slots before the compact positions in that source: ``chunk_size`` after earlier passes, else 0.
        open_index: (B, chunk_size) flat index, same source, of the tokens of the chunk that stays open.
        open_lengths: (B,) tokens in the chunk that stays open (on the CPU).
        full: every closed chunk holds ``chunk_size`` tokens and every row closes N.
        chunk_of_token: (B, L) chunk of each input token, counted from the first that closes in this pass (on the CPU).
        upper: the same for the upper decoder.
    """

    row_lengths: Tensor
    compact_length: int
    token_position: Tensor
    token_index: Tensor
    is_landmark: Tensor
    closed_counts: Tensor
    landmark_index: Tensor
    chunk_lengths: Tensor
    encoder_index: Tensor
    carried: int
    open_index: Tensor
    open_lengths: Tensor
    full: bool
    chunk_of_token: Tensor
    upper: UpperLayout


def upper_reach(config: DRTConfig, kept: int) -> int:
    """Positions at the end of a row that the upper decoder must run over, for ``kept`` hidden states and a cache.

    The last ``kept`` tokens may all be followed by landmarks. A layer's output at a position depends on its input at
    the W - 1 positions before, and on the state that the landmark serving the position, at most S + 1 before, has
    where it enters the layer's group. What a cache keeps of the upper decoder, the input of each layer at the last
    W - 1 positions and the last landmark's selections, reaches no further.
    """
    window = config.sliding_window - 1
    landmark = max(window, config.chunk_size + 1)
    return 2 * kept + sum((layers - 1) * window + landmark for layers in config.layers_per_group)


@torch.compiler.disable
def build_chunk_layout(
    batch_size: int,
    length: int,
    chunk_size: int,
    *,
    landmark_predicts: bool,
    attention_mask: Tensor | None = None,
    chunk_ends: Tensor | None = None,
    open_lengths: Tensor | None = None,
    kept: int | Tensor | None = None,
    reach: int | None = None,
    device: torch.device | str = "cpu",
) -> ChunkLayout:
    """Lay out ``length`` new tokens a row.

    Args:
        batch_size: rows B.
        length: new tokens L of each row, left padding included.
        chunk_size: tokens S of a full chunk.
        landmark_predicts: a landmark uses its own chunk's selection and predicts for the chunk's last token.
        attention_mask: (B, L), nonzero for tokens, zero for padding before and, without a cache, behind them.
            ``None``: no padding.
        chunk_ends: (B, L) bool, close the open chunk after this token. ``None``: only full chunks close.
        open_lengths: (B,) tokens already in each row's open chunk; ``None`` for a first pass.
        kept: hidden states wanted, of the last tokens of each row, of the columns in a tensor (n,), or of each row's
            own columns (B, n); ``None``: of all.
        reach: positions at the end of each row that the upper decoder shall run over; ``None``: all.
        device: where the indices shall lie.
    """
    given = (attention_mask, chunk_ends, open_lengths, kept, reach)
    make = _plain_layout if all(x is None for x in given) else _layout
    return make(batch_size, length, chunk_size, landmark_predicts, *given, torch.device(device))


def _layout(
    batch_size: int,
    length: int,
    chunk_size: int,
    landmark_predicts: bool,
    attention_mask: Tensor | None,
    chunk_ends: Tensor | None,
    open_lengths: Tensor | None,
    kept: int | Tensor | None,
    reach: int | None,
    device: torch.device,
) -> ChunkLayout:
    """`build_chunk_layout`, computed anew."""
    rows = torch.arange(batch_size, device="cpu").unsqueeze(1)
    is_token = (
        torch.ones(batch_size, length, dtype=torch.bool, device="cpu")
        if attention_mask is None
        else attention_mask.cpu() != 0
    )
    carried_lengths = (
        torch.zeros(batch_size, dtype=torch.long, device="cpu") if open_lengths is None else open_lengths
    )
    offset, closes = _close_chunks(is_token, chunk_ends, carried_lengths, chunk_size)

    chunk = closes.cumsum(1) - closes.long()  # chunk of each token, counted from the first that closes here
    closed_counts = closes.sum(1)
    num_closed = int(closed_counts.max())
    position = is_token.cumsum(1) - 1 + chunk  # compact position
    row_lengths = is_token.sum(1) + closed_counts
    compact_length = max(int(row_lengths.max()), 1)  # a slice of a batch may hold nothing but padding

    row_of, column_of = is_token.nonzero(as_tuple=True)
    token_index = torch.zeros(batch_size, compact_length, dtype=torch.long, device="cpu")
    token_index[row_of, position[row_of, column_of]] = row_of * length + column_of
    selection = torch.full((batch_size, compact_length), -1, device="cpu")  # block of each compact position
    selection[row_of, position[row_of, column_of]] = chunk[row_of, column_of]
    is_landmark = torch.zeros(batch_size, compact_length, dtype=torch.bool, device="cpu")
    landmark_index = torch.zeros(batch_size, num_closed, dtype=torch.long, device="cpu")
    chunk_lengths = torch.zeros(batch_size, num_closed, dtype=torch.long, device="cpu")
    close_row, close_column = closes.nonzero(as_tuple=True)
    close_position = position[close_row, close_column] + 1
    close_chunk = chunk[close_row, close_column]
    is_landmark[close_row, close_position] = True
    landmark_index[close_row, close_chunk] = close_row * compact_length + close_position
    chunk_lengths[close_row, close_chunk] = offset[close_row, close_column] + 1
    selection[close_row, close_position] = close_chunk + int(landmark_predicts)

    output_position = torch.where(is_token, position + (closes.long() if landmark_predicts else 0), -1)
    carried = 0 if open_lengths is None else chunk_size
    grid = _chunk_grid(is_token, chunk, offset, position, carried_lengths, carried, num_closed, chunk_size)
    grid = grid + rows.unsqueeze(2) * (carried + compact_length)
    output_position = keep_columns(output_position, kept.cpu() if isinstance(kept, Tensor) else kept)
    upper = _upper(row_lengths, is_landmark, selection, output_position, reach, device)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    # With a cache, which alone asks: the last column is a token, or the row has none.
    last_offset = (offset * is_token)[:, -1] + 1
    stays_open = torch.where(is_token[:, -1], torch.where(closes[:, -1], 0, last_offset), carried_lengths)
    return ChunkLayout(
        row_lengths=row_lengths,
        compact_length=compact_length,
        token_position=position.clamp_min(0) + rows * compact_length,
        token_index=place(token_index),
        is_landmark=place(is_landmark),
        closed_counts=closed_counts,
        landmark_index=place(landmark_index),
        chunk_lengths=place(chunk_lengths),
        encoder_index=place(grid[:, :num_closed]),
        carried=carried,
        open_index=place(grid.gather(1, closed_counts.view(-1, 1, 1).expand(-1, 1, chunk_size)).squeeze(1)),
        open_lengths=stays_open,
        full=bool((chunk_lengths == chunk_size).all()),
        chunk_of_token=chunk,
        upper=upper,
    )


@lru_cache(maxsize=4)
def _plain_layout(*arguments: Any) -> ChunkLayout:
    """The layout of whole rows, the same in every step of training on plain text: made, and brought there, once."""
    with torch.inference_mode(False):  # a tensor made in inference mode could serve no training step
        return _layout(*arguments)


def _close_chunks(
    is_token: Tensor, chunk_ends: Tensor | None, carried_lengths: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Each token's offset in its chunk, and whether the chunk closes after it; both (B, L)."""
    column = torch.arange(is_token.shape[1], device="cpu").expand_as(is_token)
    first = is_token.long().argmax(1, keepdim=True)
    region_start = first - carried_lengths.unsqueeze(1)  # where the chunks are counted from
    if chunk_ends is None:
        offset = (column - region_start) % chunk_size
        return offset, is_token & (offset == chunk_size - 1)
    ends = chunk_ends.cpu().bool() & is_token
    after_end = torch.where(ends, column + 1, torch.iinfo(torch.long).min)
    previous = torch.cat([region_start, after_end[:, :-1]], 1).cummax(1).values
    offset = (column - previous) % chunk_size
    return offset, ends | (is_token & (offset == chunk_size - 1))


def _chunk_grid(
    is_token: Tensor,
    chunk: Tensor,
    offset: Tensor,
    position: Tensor,
    carried_lengths: Tensor,
    carried: int,
    num_closed: int,
    chunk_size: int,
) -> Tensor:
    """(B, N + 1, chunk_size) source slot of each chunk's tokens, first slots first; unused slots point at slot 0."""
    grid = torch.zeros(is_token.shape[0], num_closed + 1, chunk_size, dtype=torch.long, device="cpu")
    row, column = is_token.nonzero(as_tuple=True)
    grid[row, chunk[row, column], offset[row, column]] = position[row, column] + carried
    if carried:
        slot = torch.arange(chunk_size, device="cpu").expand(is_token.shape[0], -1)
        grid[:, 0] = torch.where(slot < carried_lengths.unsqueeze(1), slot, grid[:, 0])
    return grid


def _upper(
    row_lengths: Tensor,
    is_landmark: Tensor,
    selection: Tensor,
    output_position: Tensor,
    reach: int | None,
    device: torch.device | str,
) -> UpperLayout:
    """Cut what concerns the upper decoder to the last ``reach`` positions of each row."""
    batch_size, compact_length = is_landmark.shape
    rows = torch.arange(batch_size, device="cpu").unsqueeze(1)
    width = compact_length if reach is None else min(reach, compact_length)
    start = (row_lengths - width).clamp_min(0).unsqueeze(1)
    total = is_landmark.sum(1)
    index = None
    if width < compact_length:
        position = (start + torch.arange(width, device="cpu")).clamp_max(compact_length - 1)
        index = (position + rows * compact_length).to(device)
        is_landmark, selection = is_landmark.gather(1, position), selection.gather(1, position)
    closed_counts = is_landmark.sum(1)
    skipped = total - closed_counts
    row, position = is_landmark.nonzero(as_tuple=True)
    landmark = is_landmark.cumsum(1)[row, position] - 1
    landmark_index = torch.zeros(batch_size, int(closed_counts.max()), dtype=torch.long, device="cpu")
    landmark_index[row, landmark] = row * width + position
    selection = torch.where(selection < 0, -1, selection - skipped.unsqueeze(1))
    number = torch.arange(landmark_index.shape[1], device="cpu")
    chunks_before = torch.where(number < closed_counts.unsqueeze(1), skipped.unsqueeze(1) + number, -1)
    block_size, block_index, block_inverse = _blocks(selection, landmark_index.shape[1])
    output = output_position - start  # negative at padding
    output_selection = torch.where(output < 0, -1, selection.gather(1, output.clamp_min(0)))
    _, output_block_index, output_block_inverse = _blocks(output_selection, landmark_index.shape[1])
    return UpperLayout(
        index=index,
        row_lengths=row_lengths.clamp_max(width),
        output_index=(output.clamp_min(0) + rows * width).to(device),
        closed_counts=closed_counts,
        skipped_chunks=skipped,
        landmark_index=landmark_index.to(device),
        chunks_before=chunks_before.to(device),
        block_size=block_size,
        block_index=block_index.to(device),
        block_inverse=block_inverse.to(device),
        output_block_index=output_block_index.to(device),
        output_block_inverse=output_block_inverse.to(device),
    )


def _blocks(selection: Tensor, num_closed: int) -> tuple[int, Tensor, Tensor]:
    """Group compact positions that share a selection into equal blocks of query slots."""
    batch_size, compact_length = selection.shape
    column = torch.arange(compact_length, device="cpu").expand_as(selection)
    row, position = (selection >= 0).nonzero(as_tuple=True)
    served_by = selection[row, position]
    first = torch.full((batch_size, num_closed + 1), compact_length, device="cpu")
    first[:, 0] = 0
    first.view(-1).scatter_reduce_(0, row * (num_closed + 1) + served_by, position, "amin")
    within = column - first.gather(1, selection.clamp_min(0))
    block_size = int(within[row, position].max()) + 1 if len(row) else 1
    if (
        block_size > 1
    ):  # kernels are compiled for each size, and what is kept of a batch differs from step to step
        block_size = -(-block_size // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    slots = (num_closed + 1) * block_size
    slot = served_by * block_size + within[row, position]
    index = torch.full((batch_size, slots), -1, device="cpu")
    index[row, slot] = row * compact_length + position
    inverse = torch.full((batch_size, compact_length), -1, device="cpu")
    inverse[row, position] = row * slots + slot
    return block_size, index, inverse
