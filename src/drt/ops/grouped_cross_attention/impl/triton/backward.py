# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def"
"""Backward: dQ and dw go by block, as the forward does; dK and dV go by chunk, over the blocks that selected it.

The second walk follows an inverse index, so every gradient is written once, by one program, in a fixed order: no
atomics, and the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drt.ops.grouped_cross_attention.impl.triton.primitives import load_matrix, masked_scores, row_offsets
from drt.ops.grouped_cross_attention.impl.triton.problem import Problem


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
    weights,
    lengths,
    log_sums,
    grad_output,
    deltas,
    grad_keys,
    grad_values,
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
):
    """A program: dK and dV of one tile of one chunk's positions, summed over the slots that hold the chunk."""
    ROWS: tl.constexpr = BLOCK_SIZE * GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    TILES: tl.constexpr = (SIZE + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0).to(tl.int64)
    head = program // TILES % KV_HEADS
    batch = program // TILES // KV_HEADS // chunks
    chunk = program // TILES // KV_HEADS % chunks
    positions = (program % TILES) * BLOCK_S + tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    base = batch * stride_batch + chunk * stride_chunk + head * stride_head
    base += chunk // slots * stride_block + chunk % slots * stride_slot
    start = tl.load(first_user + batch * (chunks + 1) + chunk)
    stop = tl.load(first_user + batch * (chunks + 1) + chunk + 1)
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
    places = ((batch * chunks + chunk) * SIZE + positions) * KV_HEADS * DIM + head * DIM
    mask = (positions < SIZE)[:, None] & (dims < DIM)[None, :]
    target = places[:, None] + dims[None, :]
    tl.store(grad_keys + target, (dk * scale).to(grad_keys.dtype.element_ty), mask=mask)
    tl.store(grad_values + target, dv.to(grad_values.dtype.element_ty), mask=mask)


def inverse_index(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which slots hold each chunk: slot numbers n * K + k (B, N * K) by chunk, and (B, C + 1) where a chunk's begin."""
    # Empty slots are sorted behind the last chunk.
    chunk = problem.indices.masked_fill(problem.lengths == 0, problem.chunks).flatten(1)
    ordered, users = torch.sort(chunk, dim=1, stable=True)
    bounds = torch.arange(problem.chunks + 1, dtype=ordered.dtype, device=ordered.device)
    first = torch.searchsorted(ordered, bounds.expand(ordered.shape[0], -1).contiguous())
    return users, first


def backward(
    problem: Problem, log_sums: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, values (contiguous, shaped like those) and of the weights (B, N, K) in float32."""
    constants = problem.constants()
    grad_output = grad_output.contiguous()
    grad_query = torch.empty_like(problem.query)
    deltas = problem.per_row()
    tiles = triton.cdiv(problem.rows, constants["BLOCK_R"])
    programs = problem.kv_heads * tiles
    weight_parts = deltas.new_empty(*problem.weights.shape[:2], programs, problem.slots)
    blocks_per_batch = problem.indices.shape[1]
    scales = (problem.scale, problem.scale_log2())
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
        blocks_per_batch,
        problem.slots,
        *scales,
        *problem.strides,
        **constants,
    )
    grad_keys, grad_values = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (problem.keys, problem.values)
    )
    tiles = triton.cdiv(problem.size, constants["BLOCK_S"])
    chunk_kernel[(problem.indices.shape[0] * problem.chunks * problem.kv_heads * tiles,)](
        problem.query,
        problem.keys,
        problem.values,
        *inverse_index(problem),
        problem.weights,
        problem.lengths,
        log_sums,
        grad_output,
        deltas,
        grad_keys,
        grad_values,
        problem.chunks,
        blocks_per_batch,
        problem.slots,
        *scales,
        *problem.strides,
        **constants,
    )
    return grad_query, grad_keys, grad_values, weight_parts.sum(dim=2)
