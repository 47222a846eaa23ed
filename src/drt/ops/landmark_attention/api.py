"""The grouped softmax over everything before (training), and over retrieved chunks only (any length).

A row is chunks of S tokens and a landmark, S + 1 slots each. A query's weights are a softmax over the tokens of its own
chunk up to itself and the landmarks of the chunks before; what a landmark gets is shared out among its chunk's tokens
by a softmax of their own. Landmarks have no values, and a query never sees its own chunk's landmark (section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drt.ops.window_attention import apply_rope

QUERY_BLOCK = 256  # queries whose weights over all keys are held at a time


def grouped_softmax_attention(query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Tensor:
    """Attention of each slot to all before it, every chunk taking part.

    The backward pass computes the weights again, a block of queries at a time, so that memory stays linear.

    Args:
        query: (B, P, h, D), positions applied.
        key: (B, P, h_kv, D), positions applied; h_kv divides h. value: like key.
        chunk_size: tokens S of a chunk; slot p is a landmark where p % (S + 1) = S.

    Returns:
        (B, P, h, D).
    """
    if query.numel() == 0:
        return query.clone()
    slots = chunk_size + 1
    length, repeats = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (
        _in_chunks(x, slots).permute(0, 3, 1, 2, 4).repeat_interleave(repeats, 1) for x in (key, value)
    )
    query = query.transpose(1, 2) * query.shape[-1] ** -0.5
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        part = query[:, :, start : start + QUERY_BLOCK]
        chunks = -(-(start + part.shape[2]) // slots)
        outputs.append(
            checkpoint(
                _attend_to_all, part, key[:, :, :chunks], value[:, :, :chunks], start, use_reentrant=False
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """(B, h, Q, D) scaled queries of slots start, start + 1, ... over (B, h, C, S + 1, D)."""
    slots = key.shape[3]
    position = torch.arange(start, start + query.shape[2], device=query.device)
    chunk, offset = position // slots, position % slots
    scores = _wide(torch.einsum("bhqd,bhcsd->bhqcs", query, key))
    tokens, landmarks = scores[..., :-1], scores[..., -1]
    at = chunk.view(1, 1, -1, 1, 1).expand(*tokens.shape[:3], 1, slots - 1)
    own = tokens.gather(3, at).squeeze(3)
    number = torch.arange(slots - 1, device=query.device)
    own = own.masked_fill(number > offset.unsqueeze(-1), -torch.inf)
    earlier = torch.arange(key.shape[2], device=query.device) < chunk.unsqueeze(-1)
    gate = torch.softmax(torch.cat([own, landmarks.masked_fill(~earlier, -torch.inf)], -1), -1)
    weights = torch.softmax(tokens, -1) * gate[..., slots - 1 :, None]
    weights = weights.scatter_add(3, at, gate[..., None, : slots - 1])
    return torch.einsum("bhqcs,bhcsd->bhqd", weights.to(value.dtype), value[..., :-1, :])


def retrieving_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    local_chunks: int,
    max_distance: int,
    rope_theta: float,
) -> Tensor:
    """Attention of new slots to their own chunk, the chunks just before and the best of the others.

    Each query and head chooses for itself, by its landmark scores. A chunk further back than ``max_distance`` lies at
    that distance, so that no position is one that training has not seen (the paper's stingy position mapping).

    Args:
        query: (B, P, h, D) without positions.
        key: (B, M, h_kv, D), rows at slot 0, finite behind their ends, rotated to their slot inside the chunk.
            value: like key.
        held: (B,) on the CPU, slots of each row before the first query.
        chunk_size: tokens S of a chunk.
        top_k: chunks read beside the local ones.
        local_chunks: chunks just before the query's own that are always read.
        max_distance: in chunks.
        rope_theta: base of the rotary angles.

    Returns:
        (B, P, h, D).
    """
    if query.numel() == 0:
        return query.clone()
    slots = chunk_size + 1
    length = query.shape[1]
    rows = torch.arange(query.shape[0], device=query.device).unsqueeze(1)
    keys, values = _in_chunks(key, slots), _in_chunks(value, slots)
    query = query * query.shape[-1] ** -0.5
    output = query.new_zeros(query.shape[0], length + 1, *query.shape[2:], dtype=value.dtype)
    started = held % slots
    for block in range(-(-(int(started.max()) + length) // slots)):
        position = block * slots - started.unsqueeze(1) + torch.arange(slots, device="cpu")
        valid = (position >= 0) & (position < length)
        if not bool(valid.any()):
            continue
        offset = valid.any(0).nonzero().flatten()
        position = torch.where(valid, position, length)[:, offset].to(query.device)
        chunk = (held // slots + block).clamp_max(keys.shape[1] - 1).to(query.device)
        asked = query[rows, position.clamp_max(length - 1)]
        distances = min(max_distance, int(chunk.max()))
        rotated = _rotate(asked, offset.to(query.device), distances, slots, rope_theta)
        chosen, gates = _choose(rotated, keys[:, :, -1], chunk, top_k, local_chunks)
        output[rows, position] = _attend_to_chosen(
            rotated, keys, values, chunk, offset.to(query.device), chosen, gates
        )
    return output[:, :length]


def _wide(scores: Tensor) -> Tensor:
    """In float32 at least."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _in_chunks(x: Tensor, slots: int) -> Tensor:
    """(B, M, ...) to (B, C, slots, ...), zeros behind the end."""
    tail = -x.shape[1] % slots
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, slots))


def _rotate(query: Tensor, offset: Tensor, distances: int, slots: int, theta: float) -> Tensor:
    """(B, Q, h, D) to (B, h, Q, distances + 1, D): as seen from each distance in chunks."""
    steps = torch.arange(distances + 1, device=query.device)
    positions = (steps * slots + offset.unsqueeze(1)).flatten()
    spread = query.unsqueeze(2).expand(-1, -1, distances + 1, -1, -1).flatten(1, 2)
    return apply_rope(spread, positions, theta).unflatten(1, (-1, distances + 1)).permute(0, 3, 1, 2, 4)


def _choose(
    rotated: Tensor, landmarks: Tensor, chunk: Tensor, top_k: int, local_chunks: int
) -> tuple[Tensor, Tensor]:
    """Chunks (B, h, Q, K) that each query and head reads, and their landmark scores, -inf for an empty slot."""
    num_chunks = landmarks.shape[1]
    landmarks = landmarks.repeat_interleave(rotated.shape[1] // landmarks.shape[2], 2)
    scores = _wide(torch.einsum("bhqd,bchd->bhqc", rotated[:, :, :, -1], landmarks))
    near = rotated[:, :, :, 1:-1]
    if near.shape[3]:  # what is nearer than the furthest distance is seen at its own
        back = chunk.unsqueeze(1) - torch.arange(1, near.shape[3] + 1, device=chunk.device)
        rows = torch.arange(len(chunk), device=chunk.device).unsqueeze(1)
        found = _wide(torch.einsum("bhqnd,bnhd->bhqn", near, landmarks[rows, back.clamp_min(0)]))
        column = torch.where(back >= 0, back, num_chunks)[:, None, None].expand_as(found)
        scores = torch.nn.functional.pad(scores, (0, 1)).scatter(3, column, found)[..., :num_chunks]
    number = torch.arange(num_chunks, device=chunk.device)
    chunk = chunk.view(-1, 1, 1, 1)
    is_local = (number < chunk) & (number >= chunk - local_chunks)
    # In the first layer all landmarks are alike, so equal scores are the rule: of those the later chunk is chosen,
    # whatever rounding says.
    rank = ((scores.clamp(-1e6, 1e6) * 1024).round().long() << 24) + number
    most = torch.iinfo(torch.long).max
    rank = rank.masked_fill(is_local, most).masked_fill(number >= chunk, -most)
    chosen = rank.topk(min(top_k + local_chunks, num_chunks), -1).indices
    return chosen, scores.masked_fill(number >= chunk, -torch.inf).gather(-1, chosen)


def _attend_to_chosen(
    rotated: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: Tensor,
    offset: Tensor,
    chosen: Tensor,
    landmark_scores: Tensor,
) -> Tensor:
    """(B, Q, h, D) outputs of queries at slots ``offset`` of each row's chunk."""
    size, repeats = keys.shape[2] - 1, rotated.shape[1] // keys.shape[3]
    rows = torch.arange(len(chunk), device=chunk.device)
    own_keys, own_values = (x[rows, chunk, :-1].repeat_interleave(repeats, 2) for x in (keys, values))
    own = _wide(torch.einsum("bhqd,bshd->bhqs", rotated[:, :, :, 0], own_keys))
    own = own.masked_fill(torch.arange(size, device=chunk.device) > offset.unsqueeze(-1), -torch.inf)
    gate = torch.softmax(torch.cat([own, landmark_scores], -1), -1)
    row = rows.view(-1, 1, 1, 1)
    head = (torch.arange(rotated.shape[1], device=chunk.device) // repeats).view(1, -1, 1, 1)
    read_keys, read_values = (
        x.permute(0, 3, 1, 2, 4)[row, head, chosen][..., :-1, :] for x in (keys, values)
    )
    distance = (chunk.view(-1, 1, 1, 1) - chosen).clamp(0, rotated.shape[3] - 1)
    asked = rotated.gather(3, distance.unsqueeze(-1).expand(*distance.shape, rotated.shape[-1]))
    tokens = _wide(torch.einsum("bhqkd,bhqksd->bhqks", asked, read_keys))
    weights = torch.softmax(tokens, -1) * gate[..., size:, None]
    output = torch.einsum("bhqks,bhqksd->bqhd", weights.to(read_values.dtype), read_values)
    return output + torch.einsum("bhqs,bshd->bqhd", gate[..., :size].to(own_values.dtype), own_values)
