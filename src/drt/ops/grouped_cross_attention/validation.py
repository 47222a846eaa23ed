"""Semantic checks shared by all implementations: shapes, kinds of dtype, devices, ranges."""

from __future__ import annotations

import torch


def check_grouped(
    query: torch.Tensor,
    chunk_keys: torch.Tensor,
    chunk_values: torch.Tensor,
    chunk_indices: torch.Tensor,
    chunk_weights: torch.Tensor,
    chunk_lengths: torch.Tensor | None,
    block_size: int,
) -> None:
    """Check the arguments of `grouped_cross_attention`; raise ValueError naming the first that is wrong."""
    blocks = _check_query(query, block_size)
    check_table(chunk_keys, chunk_indices)
    _check_keys_fit("chunk", query, chunk_keys, chunk_values)
    batch, chunks, size = chunk_keys.shape[:3]
    if chunk_indices.shape[:2] != (query.shape[0], blocks):
        raise ValueError(
            f"chunk_indices must be (B, L / block_size, K) with B={query.shape[0]} and L / block_size={blocks}; "
            f"got {tuple(chunk_indices.shape)}"
        )
    _check_weights(chunk_weights, chunk_indices.shape, "chunk_indices")
    if chunk_lengths is not None:
        _check_lengths("chunk_lengths", chunk_lengths, (batch, chunks), size)
    _check_devices(
        query,
        chunk_keys=chunk_keys,
        chunk_values=chunk_values,
        chunk_indices=chunk_indices,
        chunk_weights=chunk_weights,
        chunk_lengths=chunk_lengths,
    )


def check_gathered(
    query: torch.Tensor,
    gathered_keys: torch.Tensor,
    gathered_values: torch.Tensor,
    chunk_weights: torch.Tensor,
    gathered_lengths: torch.Tensor | None,
    block_size: int,
) -> None:
    """Check the arguments of `attend_gathered_chunks`; raise ValueError naming the first that is wrong."""
    blocks = _check_query(query, block_size)
    if gathered_keys.dim() != 6:
        raise ValueError(
            f"gathered_keys must be (B, N, K, S, h_kv, D); got shape {tuple(gathered_keys.shape)}"
        )
    _check_keys_fit("gathered", query, gathered_keys, gathered_values)
    slots = gathered_keys.shape[:3]
    if slots[1] != blocks:
        raise ValueError(
            f"gathered_keys must hold N = L / block_size = {blocks} blocks in dimension 1; got {slots[1]}"
        )
    _check_weights(chunk_weights, slots, "the first three dimensions of gathered_keys")
    if gathered_lengths is not None:
        _check_lengths("gathered_lengths", gathered_lengths, tuple(slots), gathered_keys.shape[3])
    _check_devices(
        query,
        gathered_keys=gathered_keys,
        gathered_values=gathered_values,
        chunk_weights=chunk_weights,
        gathered_lengths=gathered_lengths,
    )


def check_table(chunk_keys: torch.Tensor, chunk_indices: torch.Tensor) -> None:
    """Check a table of chunks and indices into it."""
    if chunk_keys.dim() != 5:
        raise ValueError(f"chunk_keys must be (B, C, S, h_kv, D); got shape {tuple(chunk_keys.shape)}")
    if chunk_indices.dim() != 3 or chunk_indices.shape[0] != chunk_keys.shape[0]:
        raise ValueError(
            f"chunk_indices must be (B, N, K) with B={chunk_keys.shape[0]}; got shape {tuple(chunk_indices.shape)}"
        )
    if chunk_indices.shape[2] < 1:
        raise ValueError("chunk_indices must have K >= 1 slots; got 0")
    _check_integers("chunk_indices", chunk_indices)
    _check_range("chunk_indices", chunk_indices, -1, chunk_keys.shape[1] - 1)


def _check_query(query: torch.Tensor, block_size: int) -> int:
    if query.dim() != 4:
        raise ValueError(f"query must be (B, L, h, D); got shape {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"query must have a floating dtype; got {query.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}")
    length = query.shape[1]
    if length % block_size:
        raise ValueError(f"query length L must be a multiple of block_size={block_size}; got L={length}")
    return length // block_size


def _check_keys_fit(kind: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    if values.shape != keys.shape:
        raise ValueError(
            f"{kind}_values must have the shape of {kind}_keys, {tuple(keys.shape)}; got {tuple(values.shape)}"
        )
    for name, tensor in ((f"{kind}_keys", keys), (f"{kind}_values", values)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype, {query.dtype}; got {tensor.dtype}")
    batch, _, heads, dim = query.shape
    size, kv_heads, key_dim = keys.shape[-3:]
    if keys.shape[0] != batch:
        raise ValueError(f"{kind}_keys must have query's batch size, {batch}; got {keys.shape[0]}")
    if key_dim != dim:
        raise ValueError(f"{kind}_keys must have query's head dimension, {dim}; got {key_dim}")
    if size < 1:
        raise ValueError(f"{kind}_keys must have S >= 1 positions a chunk; got {size}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"h_kv must divide query's h={heads} heads; got h_kv={kv_heads}")


def _check_weights(weights: torch.Tensor, shape: tuple[int, ...], like: str) -> None:
    if weights.shape != tuple(shape):
        raise ValueError(
            f"chunk_weights must have the shape of {like}, {tuple(shape)}; got {tuple(weights.shape)}"
        )
    if not weights.is_floating_point():
        raise ValueError(f"chunk_weights must have a floating dtype; got {weights.dtype}")


def _check_lengths(name: str, lengths: torch.Tensor, shape: tuple[int, ...], size: int) -> None:
    if lengths.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(lengths.shape)}")
    _check_integers(name, lengths)
    _check_range(name, lengths, 0, size)


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype; got {tensor.dtype}")


def _check_range(name: str, tensor: torch.Tensor, low: int, high: int) -> None:
    """Look at the values where that is cheap: on the CPU, outside a compiled graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)
    if int(smallest) < low or int(largest) > high:
        raise ValueError(
            f"{name} must lie in [{low}, {high}]; got values in [{int(smallest)}, {int(largest)}]"
        )


def _check_devices(query: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}; got {tensor.device}")
