# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Backward: dQ and dw go by block, as the forward does; dK and dV go by chunk, over the blocks that selected it.

The second walk follows an inverse index, so every gradient is summed in a fixed order: no atomics, and the same bits
every run. A chunk that very many slots hold is shared out over several programs, whose sums are added afterwards in
order: one that every block selects would else be walked by one program, alone, long after the others have ended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from drt.ops.grouped_cross_attention.impl.triton.primitives import load_matrix, masked_scores, row_offsets
from drt.ops.grouped_cross_attention.impl.triton.problem import Problem

# Slots that one program walks for a chunk: several times the mean, which is K where all slots are filled.
SHARE = 64


@triton.jit
def query_kernel(
    query,
    keys,
    values,
    indices,
    weights,
    lengths,
    log_sums,
    grad_output,
    grad_query,
    grad_weights,
    deltas,
    blocks_per_batch,
    slots,
    scale,
    scale_log2,
    stride_batch,
    stride_chunk,
    stride_block,
    stride_slot,
    stride_position,
    stride_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program: dQ of one tile of rows, and their share of dw; also dO . o of every softmax, for `chunk_kernel`."""
    ROWS: tl.constexpr = BLOCK_SIZE * GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0).to(tl.int64)
    head = program // TILES % KV_HEADS
    block = program // TILES // KV_HEADS
    rows = (program % TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    offsets = row_offsets(block, head, rows, HEADS, GROUP, DIM, BLOCK_SIZE)
    q = load_matrix(query, offsets, rows < ROWS, dims, DIM)
    do = load_matrix(grad_output, offsets, rows < ROWS, dims, DIM)
    base = (
        block // blocks_per_batch * stride_batch
        + block % blocks_per_batch * stride_block
        + head * stride_head
    )
    dq = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for slot in range(slots):
        place = block * slots + slot
        chunk = base + tl.load(indices + place).to(tl.int64) * stride_chunk + slot * stride_slot
        length = tl.load(lengths + place)
        weight = tl.load(weights + place)
        softmax = ((block * KV_HEADS + head) * slots + slot) * ROWS + rows
        log_sum = tl.load(log_sums + softmax, mask=rows < ROWS, other=0.0)
        delta = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, SIZE, BLOCK_S):
            positions = start + tl.arange(0, BLOCK_S)
            valid = positions < length
            places = positions.to(tl.int64) * stride_position
            k = load_matrix(keys + chunk, places, valid, dims, DIM)
            v = load_matrix(values + chunk, places, valid, dims, DIM)
            p = tl.exp2(masked_scores(q, k, valid, scale_log2, PRECISION) - log_sum[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            delta += tl.sum(p * dp, 1)
            if SIZE <= BLOCK_S:
                ds = weight * p * (dp - delta[:, None])
                dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if SIZE > BLOCK_S:
            # dS needs the whole chunk's delta, so a chunk of several tiles is read twice.
            for start in range(0, SIZE, BLOCK_S):
                positions = start + tl.arange(0, BLOCK_S)
                valid = positions < length
                places = positions.to(tl.int64) * stride_position
                k = load_matrix(keys + chunk, places, valid, dims, DIM)
                v = load_matrix(values + chunk, places, valid, dims, DIM)
                p = tl.exp2(masked_scores(q, k, valid, scale_log2, PRECISION) - log_sum[:, None])
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                ds = weight * p * (dp - delta[:, None])
                dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        tl.store(deltas + softmax, delta, mask=rows < ROWS)
        # Rows beyond the last loaded a gradient of 0, so their delta is 0.
        tl.store(grad_weights + program * slots + slot, tl.sum(delta, 0))
    mask = (rows < ROWS)[:, None] & (dims < DIM)[None, :]
    dq = (dq * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + offsets[:, None] + dims[None, :], dq, mask=mask)


@triton.jit
def chunk_kernel(
    query,
    keys,
    values,
    users,
    first_user,
    shares,
    first_share,
    first_part,
    weights,
    lengths,
    log_sums,
    grad_output,
    deltas,
    grad_keys,
    grad_values,
    key_parts,
    value_parts,
    num_shares,
    num_parts,
    chunks,
    blocks_per_batch,
    slots,
    scale,
    scale_log2,
    stride_batch,
    stride_chunk,
    stride_block,
    stride_slot,
    stride_position,
    stride_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SHARE: tl.constexpr,
):
    """A program: dK and dV of one tile of one chunk's positions, summed over a share of the slots that hold it."""
    ROWS: tl.constexpr = BLOCK_SIZE * GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    TILES: tl.constexpr = (SIZE + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0).to(tl.int64)
    head = program // TILES % KV_HEADS
    batch = program // TILES // KV_HEADS // num_shares
    share = program // TILES // KV_HEADS % num_shares
    chunk = tl.load(shares + batch * num_shares + share)
    # There may be fewer shares than programs: those left over walk nothing and write nothing.
    active = chunk < chunks
    chunk = tl.minimum(chunk, chunks - 1)
    positions = (program % TILES) * BLOCK_S + tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    base = batch * stride_batch + chunk * stride_chunk + head * stride_head
    base += chunk // slots * stride_block + chunk % slots * stride_slot
    bounds = batch * (chunks + 1) + chunk
    number = share - tl.load(first_share + bounds)
    whole = tl.load(first_share + bounds + 1) - tl.load(first_share + bounds) == 1
    start = tl.load(first_user + bounds) + number * SHARE
    stop = tl.minimum(start + SHARE, tl.load(first_user + bounds + 1))
    stop = tl.where(active, stop, start)
    per_batch = blocks_per_batch * slots
    # All users of a chunk see the same length; a chunk without users loads nothing.
    length = 0
    if stop > start:
        length = tl.load(lengths + batch * per_batch + tl.load(users + batch * per_batch + start))
    valid = positions < length
    places = positions.to(tl.int64) * stride_position
    k = load_matrix(keys + base, places, valid, dims, DIM)
    v = load_matrix(values + base, places, valid, dims, DIM)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for user in range(start, stop):
        slot = tl.load(users + batch * per_batch + user)
        weight = tl.load(weights + batch * per_batch + slot)
        block = batch * blocks_per_batch + slot // slots
        softmax = ((block * KV_HEADS + head) * slots + slot % slots) * ROWS
        for row in range(0, ROWS, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            offsets = row_offsets(block, head, rows, HEADS, GROUP, DIM, BLOCK_SIZE)
            q = load_matrix(query, offsets, rows < ROWS, dims, DIM)
            do = load_matrix(grad_output, offsets, rows < ROWS, dims, DIM)
            log_sum = tl.load(log_sums + softmax + rows, mask=rows < ROWS, other=0.0)
            delta = tl.load(deltas + softmax + rows, mask=rows < ROWS, other=0.0)
            # Transposed, (positions, rows). Rows beyond the last are zeros in q and do and add nothing.
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            p = tl.exp2(tl.where(valid[:, None], scores, float("-inf")) - log_sum[None, :])
            weighted = weight * p
            dv += tl.dot(weighted.to(do.dtype), do, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = weighted * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    part = batch * num_parts + tl.load(first_part + bounds) + number
    row = tl.where(whole, batch * chunks + chunk, part)
    target = ((row * SIZE + positions) * KV_HEADS + head)[:, None] * DIM + dims[None, :]
    mask = (positions < SIZE)[:, None] & (dims < DIM)[None, :] & active
    dk *= scale
    tl.store(grad_keys + target, dk.to(grad_keys.dtype.element_ty), mask=mask & whole)
    tl.store(grad_values + target, dv.to(grad_values.dtype.element_ty), mask=mask & whole)
    tl.store(key_parts + target, dk, mask=mask & (whole == 0))
    tl.store(value_parts + target, dv, mask=mask & (whole == 0))


@triton.jit
def parts_kernel(
    first_share,
    first_part,
    grad_keys,
    grad_values,
    key_parts,
    value_parts,
    num_parts,
    chunks,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: BLOCK of a chunk's NUMBERS of dK and dV as the sum of its parts, where it was shared out."""
    chunk = tl.program_id(0).to(tl.int64)
    batch = chunk // chunks
    bounds = batch * (chunks + 1) + chunk % chunks
    count = tl.load(first_share + bounds + 1) - tl.load(first_share + bounds)
    if count > 1:
        places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = places < NUMBERS
        dk = tl.zeros((BLOCK,), tl.float32)
        dv = tl.zeros((BLOCK,), tl.float32)
        first = batch * num_parts + tl.load(first_part + bounds)
        for part in range(first, first + count):
            dk += tl.load(key_parts + part * NUMBERS + places, mask=mask, other=0.0)
            dv += tl.load(value_parts + part * NUMBERS + places, mask=mask, other=0.0)
        target = chunk * NUMBERS + places
        tl.store(grad_keys + target, dk.to(grad_keys.dtype.element_ty), mask=mask)
        tl.store(grad_values + target, dv.to(grad_values.dtype.element_ty), mask=mask)


def inverse_index(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which slots hold each chunk: slot numbers n * K + k (B, N * K) by chunk, and (B, C + 1) where a chunk's begin."""
    # Empty slots are sorted behind the last chunk.
    chunk = problem.indices.masked_fill(problem.lengths == 0, problem.chunks).flatten(1)
    ordered, users = torch.sort(chunk, dim=1, stable=True)
    bounds = torch.arange(problem.chunks + 1, dtype=ordered.dtype, device=ordered.device)
    first = torch.searchsorted(ordered, bounds.expand(ordered.shape[0], -1).contiguous())
    return users, first


class Shares(NamedTuple):
    """Which program walks which slots of which chunk, for each of B rows; found without asking the device anything."""

    chunk: Tensor
    """(B, P) of each share, C for those left over; P is what C chunks and their slots can make at most."""
    first: Tensor
    """(B, C + 1) where a chunk's shares begin."""
    first_part: Tensor
    """(B, C + 1) where the sums of a chunk of several shares begin."""
    num_parts: int
    """What chunks of several shares can make at most: each has more than SHARE slots, and fewer than two a SHARE."""


def share_out(first_user: Tensor, slots: int) -> Shares:
    """Cut the slots of each chunk into shares, one at least.

    Args:
        first_user: (B, C + 1), of `inverse_index`.
        slots: filled slots of a row, at most.
    """
    counts = ((first_user.diff(dim=1) + SHARE - 1) // SHARE).clamp_min(1)
    first = pad(counts.cumsum(1), (1, 0))
    first_part = pad(counts.where(counts > 1, 0).cumsum(1), (1, 0))
    most = counts.shape[1] + slots // SHARE
    number = torch.arange(most, device=counts.device).expand(counts.shape[0], -1).contiguous()
    chunk = torch.searchsorted(first[:, 1:].contiguous(), number, right=True)
    return Shares(chunk, first, first_part, 2 * (slots // SHARE))


def backward(
    problem: Problem, log_sums: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, values (contiguous, shaped like those) and of the weights (B, N, K) in float32."""
    grad_output = grad_output.contiguous()
    grad_query, deltas, grad_weights = query_gradient(problem, log_sums, grad_output)
    grad_keys, grad_values = chunk_gradients(problem, log_sums, grad_output, deltas)
    return grad_query, grad_keys, grad_values, grad_weights


def query_gradient(problem: Problem, log_sums: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the query, dO . o of every softmax, gradient of the weights."""
    constants = problem.constants()
    grad_query = torch.empty_like(problem.query)
    deltas = problem.per_row()
    programs = problem.kv_heads * triton.cdiv(problem.rows, constants["BLOCK_R"])
    weight_parts = deltas.new_empty(*problem.weights.shape[:2], programs, problem.slots)
    query_kernel[(problem.blocks * programs,)](
        problem.query,
        problem.keys,
        problem.values,
        problem.indices,
        problem.weights,
        problem.lengths,
        log_sums,
        grad_output,
        grad_query,
        weight_parts,
        deltas,
        problem.indices.shape[1],
        problem.slots,
        problem.scale,
        problem.scale_log2(),
        *problem.strides,
        **constants,
    )
    return grad_query, deltas, weight_parts.sum(dim=2)


def chunk_gradients(
    problem: Problem, log_sums: Tensor, grad_output: Tensor, deltas: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    constants = problem.constants()
    batch, blocks_per_batch = problem.indices.shape[:2]
    grad_keys, grad_values = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (problem.keys, problem.values)
    )
    users, first_user = inverse_index(problem)
    shares = share_out(first_user, blocks_per_batch * problem.slots)
    numbers = problem.size * problem.kv_heads * problem.query.shape[3]
    key_parts, value_parts = (deltas.new_empty(batch, shares.num_parts, numbers) for _ in range(2))
    tiles = triton.cdiv(problem.size, constants["BLOCK_S"])
    chunk_kernel[(shares.chunk.numel() * problem.kv_heads * tiles,)](
        problem.query,
        problem.keys,
        problem.values,
        users,
        first_user,
        shares.chunk,
        shares.first,
        shares.first_part,
        problem.weights,
        problem.lengths,
        log_sums,
        grad_output,
        deltas,
        grad_keys,
        grad_values,
        key_parts,
        value_parts,
        shares.chunk.shape[1],
        shares.num_parts,
        problem.chunks,
        blocks_per_batch,
        problem.slots,
        problem.scale,
        problem.scale_log2(),
        *problem.strides,
        SHARE=SHARE,
        **constants,
    )
    if shares.num_parts:
        block = min(1024, triton.next_power_of_2(numbers))
        parts_kernel[(batch * problem.chunks, triton.cdiv(numbers, block))](
            shares.first,
            shares.first_part,
            grad_keys,
            grad_values,
            key_parts,
            value_parts,
            shares.num_parts,
            problem.chunks,
            NUMBERS=numbers,
            BLOCK=block,
        )
    return grad_keys, grad_values
