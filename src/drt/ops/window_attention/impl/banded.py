"""Window attention in blocks: batched matrix products in plain torch, linear in the length, on any device.

Queries are cut into blocks of b positions. A block sees its own keys and a fixed number before them, so that all
blocks are small dense problems of one shape, and one bias of (h, b, span) serves them all. The keys of neighbouring
blocks are overlapping views of one tensor, nothing is copied; the queries of heads that share keys are rows of one
matrix. Blocks are taken in slabs, small enough that the scores stay in cache between the product that makes them,
their softmax and the products that use them. The backward computes a slab's probabilities again, so nothing is saved
but the inputs, and adds the gradients of overlapping keys where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Queries of a block, for windows up to 256 and beyond: a small block wastes few products on keys outside the band,
# a large one makes larger products.
SMALL_BLOCK, LARGE_BLOCK, SMALL_WINDOW = 32, 64, 256
# Bytes of a slab's scores: on the CPU they should fit a core's cache, elsewhere they bound the memory in use.
SLAB_BYTES_CPU = 1 << 20
SLAB_BYTES = 1 << 28
VECTOR = 8  # keys of a block are a multiple of it: torch's softmax is slow over the rest

FORWARD = "drt::window_attention_banded"
BACKWARD = "drt::window_attention_banded_backward"
ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor values, Tensor? key_start, Tensor? slopes, int window, float scale"
)

Part = tuple[slice, slice]


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    key_start: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Arguments as in `drt.ops.window_attention.window_attention`."""
    output: Tensor = torch.ops.drt.window_attention_banded(
        query, key, value, key_start, alibi_slopes, window, scale
    )
    if key_start is None:
        return output
    position = torch.arange(key.shape[1] - query.shape[1], key.shape[1], device=query.device)
    sees_none = position < key_start.unsqueeze(1)
    return output.masked_fill(sees_none[..., None, None], 0)


class _Bands:
    """The problem as G = B * h_kv sequences of N blocks, each of R = b * h / h_kv rows over `span` keys."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        key_start: Tensor | None,
        slopes: Tensor | None,
        window: int,
        scale: float,
    ) -> None:
        window = max(1, min(window, keys.shape[1]))  # no query sees more, and each costs memory
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.scale = scale
        self.length, self.heads = query.shape[1:3]
        self.kv_heads = keys.shape[2]
        self.block = max(1, min(self.length, SMALL_BLOCK if window <= SMALL_WINDOW else LARGE_BLOCK))
        self.blocks = max(1, -(-self.length // self.block))  # one of filling alone where there is no query
        self.tail = self.blocks * self.block - self.length
        self.span = -(-(self.block + window - 1) // VECTOR) * VECTOR
        self.front = self.span - self.block - (keys.shape[1] - self.length)  # slots before the first key
        self.query = self.rows(query)
        self.keys, self.values = (self.slots(x).unfold(1, self.span, self.block) for x in (keys, values))
        self.bias = self._bias(slopes, window)
        self.missing = self._missing(key_start)
        budget = SLAB_BYTES_CPU if query.device.type == "cpu" else SLAB_BYTES
        self.step = max(1, budget // (self.query.shape[2] * self.span * self.dtype.itemsize))

    def rows(self, x: Tensor) -> Tensor:
        """(B, L, h, D) as (G, N, R, D)."""
        x = x.to(self.dtype).unflatten(2, (self.kv_heads, -1)).permute(0, 2, 1, 3, 4)
        if self.tail:
            x = pad(x, (0, 0, 0, 0, 0, self.tail))
        return x.reshape(-1, self.blocks, self.block * x.shape[3], x.shape[4])

    def from_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The reverse of `rows`."""
        x = rows.view(
            -1, self.kv_heads, self.blocks * self.block, self.heads // self.kv_heads, rows.shape[-1]
        )
        return x[:, :, : self.length].permute(0, 2, 1, 3, 4).flatten(2, 3).to(dtype).contiguous()

    def slots(self, x: Tensor) -> Tensor:
        """(B, Lk, h_kv, D) as (G, slots, D): keys that no query sees cut, zeros where a block sees none."""
        return pad(x.to(self.dtype).transpose(1, 2), (0, 0, self.front, self.tail)).flatten(0, 1)

    def from_slots(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """The reverse of `slots`."""
        x = pad(slots, (0, 0, -self.front, -self.tail)).unflatten(0, (-1, self.kv_heads))
        return x.transpose(1, 2).to(dtype).contiguous()

    def _bias(self, slopes: Tensor | None, window: int) -> Tensor:
        """(h_kv or 1, R, span): ALiBi inside the band, -inf outside."""
        slot = torch.arange(self.span, device=self.query.device)
        distance = slot[self.span - self.block :, None] - slot
        outside = (distance < 0) | (distance >= window)
        if slopes is None:
            slopes = self.query.new_zeros(self.heads // self.kv_heads)
        slopes = slopes.to(self.dtype).view(-1, 1, self.heads // self.kv_heads, 1)
        bias = -slopes * distance.unsqueeze(1)
        return bias.masked_fill(outside.unsqueeze(1), -torch.inf).flatten(1, 2)

    def _missing(self, key_start: Tensor | None) -> Tensor:
        """(G, n, 1, span), added to the scores of the first n blocks: they reach beyond the first key.

        Finite, so that a query which sees no key gets no NaN.
        """
        if key_start is None:
            furthest = max(self.front, 0)
            first = torch.full((1,), furthest, device=self.query.device)
        else:
            first = key_start + self.front
            furthest = int(first.max()) if len(first) else 0
        reaching = max(0, min(self.blocks, -(-furthest // self.block)))
        start = torch.arange(reaching, device=first.device).view(1, -1, 1, 1) * self.block
        absent = start + torch.arange(self.span, device=first.device) < first.view(-1, 1, 1, 1)
        missing = self.query.new_zeros(absent.shape).masked_fill_(absent, torch.finfo(self.dtype).min)
        if key_start is None:
            return missing.expand(self.query.shape[0], -1, -1, -1)
        return missing.repeat_interleave(self.kv_heads, 0)

    def parts(self) -> Iterator[Part]:
        """Every slab: some blocks of a sequence, or whole short sequences."""
        sequences, blocks = max(1, self.step // self.blocks), min(self.step, self.blocks)
        for first in range(0, self.query.shape[0], sequences):
            for start in range(0, self.blocks, blocks):
                yield slice(first, first + sequences), slice(start, min(start + blocks, self.blocks))

    def probabilities(self, query: Tensor, keys: Tensor, part: Part) -> Tensor:
        """The softmax of a slab's (m, R, D) queries over its (m, D, span) keys."""
        sequences, blocks = part
        numbers = torch.arange(self.query.shape[0], device=query.device)[sequences]
        scores = self.bias[numbers % self.bias.shape[0], None].repeat(1, blocks.stop - blocks.start, 1, 1)
        missing = self.missing[sequences, blocks]
        scores[:, : missing.shape[1]] += missing
        scores = scores.flatten(0, 1).baddbmm_(query, keys, alpha=self.scale)
        return torch.softmax(scores, -1)

    def add(self, total: Tensor, pieces: Tensor, part: Part) -> None:
        """Add (m, span, D) gradients of a slab's keys to those of all (G, slots, D); pieces overlap."""
        for first in range(0, self.span, self.block):
            piece = pieces[:, first : first + self.block]
            target = total[:, first:].unfold(1, piece.shape[1], self.block)[part].mT
            target += piece.view(target.shape)


def _forward(query: Tensor, *rest: Any) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        bands = _Bands(query, *rest)
        output = bands.query.new_empty(bands.query.shape)  # contiguous, so that a slab of it is a view
        for part in bands.parts():
            rows, keys, values = (x[part].flatten(0, 1) for x in (bands.query, bands.keys, bands.values))
            torch.bmm(bands.probabilities(rows, keys, part), values.mT, out=output[part].flatten(0, 1))
        return bands.from_rows(output, query.dtype)


def _backward(grad_output: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        bands = _Bands(query, *rest)
        grad_rows = bands.rows(grad_output)
        grad_query = bands.query.new_empty(bands.query.shape)
        shape = (len(grad_rows), bands.span - bands.block + bands.blocks * bands.block, query.shape[-1])
        grad_keys, grad_values = (bands.query.new_zeros(shape) for _ in range(2))
        for part in bands.parts():
            rows, keys, values, grad = (
                x[part].flatten(0, 1) for x in (bands.query, bands.keys, bands.values, grad_rows)
            )
            p = bands.probabilities(rows, keys, part)
            bands.add(grad_values, p.mT @ grad, part)
            grad_scores = torch._softmax_backward_data(grad @ values, p, -1, p.dtype)
            target = grad_query[part].flatten(0, 1)
            target.baddbmm_(grad_scores, keys.mT, beta=0, alpha=bands.scale)
            bands.add(grad_keys, _product(grad_scores.mT, rows, bands.scale), part)
        key_dtype, value_dtype = rest[0].dtype, rest[1].dtype
        return (
            bands.from_rows(grad_query, query.dtype),
            bands.from_slots(grad_keys, key_dtype),
            bands.from_slots(grad_values, value_dtype),
        )


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left @ right, without a pass of its own for the factor."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)


def _fake_forward(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape)


def _fake_backward(
    grad_output: Tensor, query: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.drt.window_attention_banded_backward(
        grad_output, *ctx.saved_tensors, ctx.window, ctx.scale
    )
    return (*grads, None, None, None, None)


torch.library.define(FORWARD, f"({ARGUMENTS}) -> Tensor")
torch.library.define(BACKWARD, f"(Tensor grad_output, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.impl(FORWARD, "CompositeExplicitAutograd", _forward)
torch.library.impl(BACKWARD, "CompositeExplicitAutograd", _backward)
torch.library.register_fake(FORWARD, _fake_forward)
torch.library.register_fake(BACKWARD, _fake_backward)
torch.library.register_autograd(FORWARD, _autograd, setup_context=_setup_context)
