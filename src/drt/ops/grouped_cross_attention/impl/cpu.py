"""Batched matrix products in plain torch: made for the CPU, right on any device.

All K chunks of a block stand side by side in one matrix, so its scores are one product and, with the weights
folded into the values, so is the weighted sum over its chunks. Blocks are taken in slabs, small enough that the
scores stay in cache between the product that makes them, their softmax and the product that uses them; neither
the gathered chunks nor the scores are ever held whole. The backward computes a slab's probabilities again, so
nothing is saved but the inputs. Slots that are empty in all blocks of a slab are left out where they come last, as
they do where few chunks have closed yet.

The sink is one more key a chunk, of zeros: its score is 0, hence a term exp(0) = 1 in the denominator, and its
value, zeros too, adds nothing. The softmax stays an ordinary one, as stable as any. More zeros, masked, round
rows up to whole vectors: torch's softmax over 31 floats takes half as long again as over 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bytes of a slab's scores: on the CPU they should fit a core's cache, elsewhere they bound the memory in use.
SLAB_BYTES_CPU = 1 << 20
SLAB_BYTES = 1 << 28
VECTOR = 8

FORWARD = "drt::grouped_cross_attention_eager"
BACKWARD = "drt::grouped_cross_attention_eager_backward"
ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor values, Tensor? indices, Tensor weights, Tensor? lengths, "
    "int block_size, float scale, bool sink"
)


def grouped_cross_attention(
    query: Tensor,
    chunk_keys: Tensor,
    chunk_values: Tensor,
    chunk_indices: Tensor,
    chunk_weights: Tensor,
    chunk_lengths: Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> Tensor:
    """Gather each slab's chunks as its turn comes, and attend to them."""
    empty = chunk_indices < 0
    lengths = None
    if chunk_keys.shape[1] == 0:
        # Nothing to select: every slot is empty. A chunk of zeros to read keeps the rest free of this case.
        chunk_keys, chunk_values = (pad(x, (0, 0, 0, 0, 0, 0, 0, 1)) for x in (chunk_keys, chunk_values))
    elif chunk_lengths is not None and not _known_full(chunk_lengths, chunk_keys.shape[2]):
        chosen = chunk_indices.long().clamp(min=0).flatten(1)
        lengths = chunk_lengths.long().gather(1, chosen).view_as(chunk_indices)
        empty = empty | (lengths == 0)
        outside = torch.arange(chunk_keys.shape[2], device=query.device) >= chunk_lengths.unsqueeze(-1)
        # What lies beyond a chunk's length may be uninitialised memory, and 0 * NaN is NaN.
        chunk_keys = chunk_keys.masked_fill(outside[..., None, None], 0)
        chunk_values = chunk_values.masked_fill(outside[..., None, None], 0)
    weights = chunk_weights.masked_fill(empty, 0)
    output: Tensor = torch.ops.drt.grouped_cross_attention_eager(
        query, chunk_keys, chunk_values, chunk_indices, weights, lengths, block_size, scale, sink
    )
    return output


def attend_gathered_chunks(
    query: Tensor,
    gathered_keys: Tensor,
    gathered_values: Tensor,
    chunk_weights: Tensor,
    gathered_lengths: Tensor | None,
    *,
    block_size: int,
    scale: float,
    sink: bool,
) -> Tensor:
    """Attend to chunks that lie gathered already."""
    weights = (
        chunk_weights if gathered_lengths is None else chunk_weights.masked_fill(gathered_lengths == 0, 0)
    )
    output: Tensor = torch.ops.drt.grouped_cross_attention_eager(
        query, gathered_keys, gathered_values, None, weights, gathered_lengths, block_size, scale, sink
    )
    return output


def _known_full(lengths: Tensor, size: int) -> bool:
    """Whether all chunks hold `size` positions, where looking neither stalls a device nor breaks a compiled graph."""
    return (
        lengths.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lengths == size).all())
    )


class Slab(NamedTuple):
    """Blocks that are taken together, and their leading slots: the others are empty."""

    blocks: slice
    slots: int


class _Chunks(Protocol):
    """Where a slab's keys or values come from, and where their gradient goes."""

    def read(self, slab: Slab) -> Tensor:
        """A slab's chunks as (n, h_kv, k, S', D): S positions, then zeros."""

    def accumulate(self, gradient: Tensor, slab: Slab) -> None:
        """Add the gradient of what read(slab) gave."""

    def gradient(self) -> Tensor:
        """The sum of what was accumulated, shaped like the tensor the chunks came from."""


def _without(chunks: Tensor, empty: Tensor | None, slab: Slab) -> Tensor:
    """A slab's chunks (n, h_kv, k, S, D) with zeros in the slots that are empty, of empty (M, K).

    What lies there is some other chunk: its weight is 0, and 0 * NaN is NaN.
    """
    if empty is None:
        return chunks
    missing = empty[slab.blocks, None, : slab.slots, None, None]
    if chunks.device.type == "cpu" and not bool(missing.any()):
        return chunks
    return chunks.masked_fill(missing, 0)


class _GatheredChunks:
    """Chunks (B, N, K, S, h_kv, D), one copy a slot."""

    def __init__(self, chunks: Tensor, empty: Tensor | None, zeros: int, dtype: torch.dtype) -> None:
        self.empty = empty
        self.slots = chunks.permute(0, 1, 4, 2, 3, 5)
        self.blocks = self.slots.flatten(0, 1)
        self.zeros, self.dtype = zeros, dtype
        self.grad: Tensor | None = None

    def read(self, slab: Slab) -> Tensor:
        chunks = _without(self.blocks[slab.blocks, :, : slab.slots].to(self.dtype), self.empty, slab)
        return pad(chunks, (0, 0, 0, self.zeros)) if self.zeros else chunks.contiguous()

    def accumulate(self, gradient: Tensor, slab: Slab) -> None:
        if self.grad is None:
            self.grad = torch.zeros(self.blocks.shape, dtype=self.blocks.dtype, device=gradient.device)
        self.grad[slab.blocks, :, : slab.slots] = gradient[..., : self.grad.shape[-2], :]

    def gradient(self) -> Tensor:
        grad = self.blocks.new_zeros(self.blocks.shape) if self.grad is None else self.grad
        return grad.view(self.slots.shape).permute(0, 1, 3, 4, 2, 5)


class _ChunkTable:
    """Chunks (B, C, S, h_kv, D) and the indices (B, N, K) of the slots that read them."""

    def __init__(
        self, chunks: Tensor, indices: Tensor, empty: Tensor | None, zeros: int, dtype: torch.dtype
    ) -> None:
        self.empty = empty
        batch, count, size, heads, dim = chunks.shape
        self.shape, self.input_dtype = chunks.shape, chunks.dtype
        table = pad(chunks.transpose(2, 3).to(dtype), (0, 0, 0, zeros))
        self.table = table.reshape(batch * count * heads, (size + zeros) * dim)
        self.chunk_shape = (size + zeros, dim)
        first = torch.arange(batch, device=chunks.device).view(batch, 1, 1, 1) * count
        head = torch.arange(heads, device=chunks.device).view(heads, 1)
        rows = (first + indices.long().clamp(min=0).unsqueeze(2)) * heads + head
        self.rows = rows.flatten(0, 1)
        self.grad: Tensor | None = None

    def read(self, slab: Slab) -> Tensor:
        rows = self.rows[slab.blocks, :, : slab.slots]
        chunks = self.table.index_select(0, rows.flatten()).view(*rows.shape, *self.chunk_shape)
        return _without(chunks, self.empty, slab)

    def accumulate(self, gradient: Tensor, slab: Slab) -> None:
        if self.grad is None:
            self.grad = torch.zeros_like(self.table)
        rows = self.rows[slab.blocks, :, : slab.slots].flatten()
        self.grad.index_add_(0, rows, gradient.view(rows.numel(), -1))

    def gradient(self) -> Tensor:
        batch, count, size, heads, dim = self.shape
        grad = torch.zeros_like(self.table) if self.grad is None else self.grad
        grad = grad.view(batch, count, heads, self.chunk_shape[0], dim)[..., :size, :].transpose(2, 3)
        return grad.to(self.input_dtype).contiguous()


class _Slabs:
    """The problem cut into slabs of blocks; M = B * N blocks, R = block_size * h / h_kv rows a block and head."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        indices: Tensor | None,
        weights: Tensor,
        lengths: Tensor | None,
        block_size: int,
        scale: float,
        sink: bool,
    ) -> None:
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.scale = scale
        heads, dim = query.shape[2:]
        size, kv_heads = keys.shape[-3:-1]
        self.block_shape = (-1, block_size, kv_heads, heads // kv_heads, dim)
        self.query = self.blocks(query)
        self.slots = _filled_slots(weights, indices, lengths)
        self.weights = weights.reshape(-1, 1, weights.shape[2], 1, 1).to(self.dtype)
        zeros = int(sink) + _filling(size + sink)
        empty = None if indices is None else indices < 0
        if lengths is not None:
            empty = lengths == 0 if empty is None else empty | (lengths == 0)
        self.keys, self.values = (
            self._chunks(x, indices, None if empty is None else empty.flatten(0, 1), zeros)
            for x in (keys, values)
        )
        self.bias = None
        if lengths is not None or zeros > sink:
            self.bias = self._bias(weights.shape, lengths, size, sink, zeros)
        score_bytes = block_size * heads * weights.shape[2] * (size + zeros) * self.dtype.itemsize
        budget = SLAB_BYTES_CPU if query.device.type == "cpu" else SLAB_BYTES
        self.step = max(1, budget // score_bytes)

    def _chunks(self, chunks: Tensor, indices: Tensor | None, empty: Tensor | None, zeros: int) -> _Chunks:
        if indices is None:
            return _GatheredChunks(chunks, empty, zeros, self.dtype)
        return _ChunkTable(chunks, indices, empty, zeros, self.dtype)

    def _bias(self, slots: torch.Size, lengths: Tensor | None, size: int, sink: bool, zeros: int) -> Tensor:
        """(M, 1, 1, K, S'): -inf where no softmax may look, but for empty slots: their weight is 0 as it is."""
        bias = self.weights.new_zeros(*slots, size)
        if lengths is not None:
            lengths = lengths.unsqueeze(-1)
            position = torch.arange(size, device=lengths.device)
            bias.masked_fill_((position >= lengths) & (lengths > 0), -torch.inf)
        bias = pad(pad(bias, (0, int(sink))), (0, zeros - sink), value=-torch.inf)
        return bias.view(-1, 1, 1, *bias.shape[2:])

    def blocks(self, tensor: Tensor) -> Tensor:
        """(B, L, h, D) as (M, block_size, h_kv, h / h_kv, D)."""
        return tensor.reshape(self.block_shape)

    def rows(self, blocks: Tensor, slab: Slab) -> Tensor:
        """A slab of blocks as matrices (n * h_kv, R, D)."""
        rows = blocks[slab.blocks].to(self.dtype).transpose(1, 2)
        return rows.reshape(rows.shape[0] * rows.shape[1], -1, rows.shape[-1])

    def write(self, blocks: Tensor, rows: Tensor, slab: Slab) -> None:
        """The reverse of `rows`."""
        target = blocks[slab.blocks].transpose(1, 2)
        target.copy_(rows.view(target.shape))

    def __iter__(self) -> Iterator[Slab]:
        """Every slab that has a slot to look at."""
        for start in range(0, self.query.shape[0], self.step):
            blocks = slice(start, start + self.step)
            slots = max(self.slots[blocks])
            if slots:
                yield Slab(blocks, slots)

    def probabilities(self, query: Tensor, keys: Tensor, slab: Slab) -> Tensor:
        """Each chunk's softmax: (n * h_kv, R, k, S')."""
        count, heads, slots, size, _ = keys.shape
        matrix = keys.view(count * heads, slots * size, -1).transpose(1, 2)
        scores = _product(query, matrix, self.scale).view(count, heads, -1, slots, size)
        if self.bias is not None:
            scores += self.bias[slab.blocks, ..., :slots, :]
        return torch.softmax(scores, dim=-1).view(count * heads, -1, slots, size)


def _filled_slots(weights: Tensor, indices: Tensor | None, lengths: Tensor | None) -> list[int]:
    """The number of each block's slots up to the last that is filled; all where looking would stall a device."""
    filled = indices >= 0 if indices is not None else lengths > 0 if lengths is not None else None
    slots = weights.shape[2]
    if filled is None or filled.device.type != "cpu":
        return [slots] * weights.shape[:2].numel()
    counts: list[int] = (filled * torch.arange(1, slots + 1, device="cpu")).amax(2).flatten().tolist()
    return counts


def _filling(positions: int) -> int:
    """How many masked positions make whole vectors of a row, where that is cheap: 0 for very short chunks."""
    filling = -positions % VECTOR
    return filling if filling * 8 <= positions else 0


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left @ right, without a pass of its own for the factor."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)


def _forward(query: Tensor, *rest: Any) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        slabs = _Slabs(query, *rest)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        output_blocks = slabs.blocks(output)
        for slab in slabs:
            keys, values = slabs.keys.read(slab), slabs.values.read(slab)
            rows = slabs.rows(slabs.query, slab)
            probabilities = slabs.probabilities(rows, keys, slab)
            weighted = (values * slabs.weights[slab.blocks, :, : slab.slots]).view(
                rows.shape[0], -1, rows.shape[2]
            )
            slabs.write(output_blocks, torch.bmm(probabilities.flatten(2), weighted), slab)
    return output


def _backward(grad_output: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        slabs = _Slabs(query, *rest)
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        grad_weights = torch.zeros_like(slabs.weights)
        grad_query_blocks, grad_output_blocks = slabs.blocks(grad_query), slabs.blocks(grad_output)
        for slab in slabs:
            keys, values = slabs.keys.read(slab), slabs.values.read(slab)
            weights = slabs.weights[slab.blocks, :, : slab.slots]
            rows = slabs.rows(slabs.query, slab)
            grad_rows = slabs.rows(grad_output_blocks, slab)
            p = slabs.probabilities(rows, keys, slab)
            matrix = (rows.shape[0], -1, rows.shape[2])

            # P^T dO serves twice: times w it is dV, and its product with V is dw (the sum of dO . o).
            unweighted = torch.bmm(p.flatten(2).transpose(1, 2), grad_rows).view(values.shape)
            grad_weights[slab.blocks, :, : slab.slots] = (unweighted * values).sum(
                dim=(1, 3, 4), keepdim=True
            )
            slabs.values.accumulate(unweighted.mul_(weights), slab)

            grad_p = torch.bmm(grad_rows, (values * weights).view(matrix).transpose(1, 2)).view(p.shape)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).flatten(2)
            grad_rows = _product(grad_scores, keys.view(matrix), slabs.scale)
            slabs.write(grad_query_blocks, grad_rows, slab)
            grad_keys = _product(grad_scores.transpose(1, 2), rows, slabs.scale)
            slabs.keys.accumulate(grad_keys.view(keys.shape), slab)
    weights = rest[3]
    grad_weights = grad_weights.view(weights.shape).to(weights.dtype)
    return grad_query, slabs.keys.gradient(), slabs.values.gradient(), grad_weights


def _fake_forward(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(chunks: Tensor) -> Tensor:
        if indices is not None:
            return torch.empty_like(chunks, memory_format=torch.contiguous_format)
        batch, blocks, slots, size, heads, dim = chunks.shape
        return chunks.new_empty(batch, blocks, heads, slots, size, dim).permute(0, 1, 3, 4, 2, 5)

    return _fake_forward(query), like(keys), like(values), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block_size, ctx.scale, ctx.sink = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.drt.grouped_cross_attention_eager_backward(
        grad_output, *ctx.saved_tensors, ctx.block_size, ctx.scale, ctx.sink
    )
    grad_query, grad_keys, grad_values, grad_weights = grads
    return grad_query, grad_keys, grad_values, None, grad_weights, None, None, None, None


torch.library.define(FORWARD, f"({ARGUMENTS}) -> Tensor")
torch.library.define(BACKWARD, f"(Tensor grad_output, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.impl(FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(BACKWARD, "CompositeExplicitAutograd", _backward)
torch.library.register_fake(FORWARD, _fake_forward)
torch.library.register_fake(BACKWARD, _fake_backward)
torch.library.register_autograd(FORWARD, _autograd, setup_context=_setup_context)
