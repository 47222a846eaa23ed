"""Where tokens, landmarks and chunks lie: the integer bookkeeping of one forward pass.

The decoder works on *compact* rows: the real tokens of a row packed to slot 0, each closed chunk's landmark right
after its last token, padding only behind the row's end, where causality makes it harmless.  Chunk boundaries are
those of the specification: a chunk closes when it holds ``chunk_size`` tokens, or earlier where the caller says so.
Everything is computed on the CPU from a mask and a few counts; the model only gathers by the indices found here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Indices of one forward pass over B rows. "Flat" indices address a (B * length) first dimension.

    Attributes:
        row_lengths: (B,) compact positions of each row (on the CPU).
        compact_length: longest row, landmarks included.
        token_index: (B, compact_length) flat index into the (B, L) input; anything at landmarks and padding.
        is_landmark: (B, compact_length) bool.
        output_index: (B, L) flat index of the compact position whose hidden state predicts the next token.
        closed_counts: (B,) chunks that close in this pass (on the CPU); N is the largest.
        landmark_index: (B, N) flat compact index of each closed chunk's landmark.
        chunk_lengths: (B, N) tokens of each closed chunk, 0 where a row closes fewer than N.
        encoder_index: (B, N, chunk_size) flat index of each chunk's tokens into (B, carried + compact_length), where
            ``carried`` slots hold the open chunk's tokens of earlier passes.
        carried: slots before the compact positions in that source: ``chunk_size`` after earlier passes, else 0.
        open_index: (B, chunk_size) flat index, same source, of the tokens of the chunk that stays open.
        open_lengths: (B,) tokens in the chunk that stays open (on the CPU).
        block_size: query slots per selection, the longest run of positions that share one.
        block_index: (B, (N + 1) * block_size) flat compact index of each query slot, -1 for an empty slot. Block 0
            is served by the selection carried from earlier passes, block n + 1 by that of closed chunk n.
        block_inverse: (B, compact_length) flat index of each compact position into (B, (N + 1) * block_size), -1
            for padding.
        full: every closed chunk holds ``chunk_size`` tokens and every row closes N.
    """

    row_lengths: Tensor
    compact_length: int
    token_index: Tensor
    is_landmark: Tensor
    output_index: Tensor
    closed_counts: Tensor
    landmark_index: Tensor
    chunk_lengths: Tensor
    encoder_index: Tensor
    carried: int
    open_index: Tensor
    open_lengths: Tensor
    block_size: int
    block_index: Tensor
    block_inverse: Tensor
    full: bool


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
    device: torch.device | str = "cpu",
) -> ChunkLayout:
    """Lay out ``length`` new tokens a row.

    Args:
        batch_size: rows B.
        length: new tokens L of each row, left padding included.
        chunk_size: tokens S of a full chunk.
        landmark_predicts: a landmark uses its own chunk's selection and predicts for the chunk's last token.
        attention_mask: (B, L), nonzero for tokens, zero for left padding. ``None``: no padding.
        chunk_ends: (B, L) bool, close the open chunk after this token. ``None``: only full chunks close.
        open_lengths: (B,) tokens already in each row's open chunk; ``None`` for a first pass.
        device: where the indices shall lie.
    """
    rows = torch.arange(batch_size).unsqueeze(1)
    is_token = (
        torch.ones(batch_size, length, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.cpu() != 0
    )
    carried_lengths = torch.zeros(batch_size, dtype=torch.long) if open_lengths is None else open_lengths
    offset, closes = _close_chunks(is_token, chunk_ends, carried_lengths, chunk_size)

    chunk = closes.cumsum(1) - closes.long()  # chunk of each token, counted from the first that closes here
    closed_counts = closes.sum(1)
    num_closed = int(closed_counts.max())
    position = is_token.cumsum(1) - 1 + chunk  # compact position
    row_lengths = is_token.sum(1) + closed_counts
    compact_length = int(row_lengths.max())

    row_of, column_of = is_token.nonzero(as_tuple=True)
    token_index = torch.zeros(batch_size, compact_length, dtype=torch.long)
    token_index[row_of, position[row_of, column_of]] = row_of * length + column_of
    selection = torch.full((batch_size, compact_length), -1)  # block of each compact position
    selection[row_of, position[row_of, column_of]] = chunk[row_of, column_of]
    is_landmark = torch.zeros(batch_size, compact_length, dtype=torch.bool)
    landmark_index = torch.zeros(batch_size, num_closed, dtype=torch.long)
    chunk_lengths = torch.zeros(batch_size, num_closed, dtype=torch.long)
    close_row, close_column = closes.nonzero(as_tuple=True)
    close_position = position[close_row, close_column] + 1
    close_chunk = chunk[close_row, close_column]
    is_landmark[close_row, close_position] = True
    landmark_index[close_row, close_chunk] = close_row * compact_length + close_position
    chunk_lengths[close_row, close_chunk] = offset[close_row, close_column] + 1
    selection[close_row, close_position] = close_chunk + int(landmark_predicts)

    output_position = position + (closes.long() if landmark_predicts else 0)
    carried = 0 if open_lengths is None else chunk_size
    grid = _chunk_grid(is_token, chunk, offset, position, carried_lengths, carried, num_closed, chunk_size)
    grid = grid + rows.unsqueeze(2) * (carried + compact_length)
    block_size, block_index, block_inverse = _blocks(selection, num_closed)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    last_offset = (offset * is_token).flip(1)[
        :, 0
    ] + 1  # left padding: the last column is a token, or the row has none
    stays_open = torch.where(is_token[:, -1], torch.where(closes[:, -1], 0, last_offset), carried_lengths)
    return ChunkLayout(
        row_lengths=row_lengths,
        compact_length=compact_length,
        token_index=place(token_index),
        is_landmark=place(is_landmark),
        output_index=place(output_position.clamp_min(0) + rows * compact_length),
        closed_counts=closed_counts,
        landmark_index=place(landmark_index),
        chunk_lengths=place(chunk_lengths),
        encoder_index=place(grid[:, :num_closed]),
        carried=carried,
        open_index=place(grid.gather(1, closed_counts.view(-1, 1, 1).expand(-1, 1, chunk_size)).squeeze(1)),
        open_lengths=stays_open,
        block_size=block_size,
        block_index=place(block_index),
        block_inverse=place(block_inverse),
        full=bool((chunk_lengths == chunk_size).all()),
    )


def _close_chunks(
    is_token: Tensor, chunk_ends: Tensor | None, carried_lengths: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Each token's offset in its chunk, and whether the chunk closes after it; both (B, L)."""
    column = torch.arange(is_token.shape[1]).expand_as(is_token)
    first = (~is_token).sum(1, keepdim=True)
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
    grid = torch.zeros(is_token.shape[0], num_closed + 1, chunk_size, dtype=torch.long)
    row, column = is_token.nonzero(as_tuple=True)
    grid[row, chunk[row, column], offset[row, column]] = position[row, column] + carried
    if carried:
        slot = torch.arange(chunk_size).expand(is_token.shape[0], -1)
        grid[:, 0] = torch.where(slot < carried_lengths.unsqueeze(1), slot, grid[:, 0])
    return grid


def _blocks(selection: Tensor, num_closed: int) -> tuple[int, Tensor, Tensor]:
    """Group compact positions that share a selection into equal blocks of query slots."""
    batch_size, compact_length = selection.shape
    column = torch.arange(compact_length).expand_as(selection)
    row, position = (selection >= 0).nonzero(as_tuple=True)
    served_by = selection[row, position]
    first = torch.full((batch_size, num_closed + 1), compact_length)
    first[:, 0] = 0
    first.view(-1).scatter_reduce_(0, row * (num_closed + 1) + served_by, position, "amin")
    within = column - first.gather(1, selection.clamp_min(0))
    block_size = int(within[row, position].max()) + 1 if len(row) else 1
    slots = (num_closed + 1) * block_size
    slot = served_by * block_size + within[row, position]
    index = torch.full((batch_size, slots), -1)
    index[row, slot] = row * compact_length + position
    inverse = torch.full((batch_size, compact_length), -1)
    inverse[row, position] = row * slots + slot
    return block_size, index, inverse
