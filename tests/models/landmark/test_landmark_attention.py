"""Landmark Attention against its equations, slot by slot, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.ops.landmark_attention import api, grouped_softmax_attention, retrieving_attention
from drt.ops.window_attention import apply_rope

THETA = 100.0
SIZE = 4


def make_inputs(length: int) -> list[Tensor]:
    return [torch.randn(2, length, heads, 6, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]


def slot_by_slot(query: Tensor, key: Tensor, value: Tensor, size: int, chosen=None) -> Tensor:
    """The grouped softmax of the paper's equations 3 to 5; ``chosen`` says which chunks (row, head, slot) may read."""
    output = torch.zeros_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            keys, values = (x[row, :, head // 2] for x in (key, value))
            for slot in range(query.shape[1]):
                chunk = slot // (size + 1)
                own = [s for s in range(chunk * (size + 1), slot + 1) if s % (size + 1) != size]
                read = range(chunk) if chosen is None else chosen(row, head, slot)
                landmarks = [c * (size + 1) + size for c in read]
                scores = keys[own + landmarks] @ query[row, slot, head] / query.shape[-1] ** 0.5
                gates = scores.softmax(0)
                total = gates[: len(own)] @ values[own]
                for gate, landmark in zip(gates[len(own) :], landmarks, strict=True):
                    tokens = list(range(landmark - size, landmark))
                    inner = (keys[tokens] @ query[row, slot, head] / query.shape[-1] ** 0.5).softmax(0)
                    total = total + gate * (inner @ values[tokens])
                output[row, slot, head] = total
    return output


@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("block", [256, 6])
def test_grouped_softmax(monkeypatch, length, block):
    monkeypatch.setattr(api, "QUERY_BLOCK", block)
    inputs = make_inputs(length)
    expected = slot_by_slot(*inputs, SIZE)
    output = grouped_softmax_attention(*inputs, SIZE)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # weights are float32
    ours, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("held", [[0, 0], [9, 2]])
@torch.no_grad()
def test_retrieval_of_everything_is_the_grouped_softmax(held):
    query, key, value = make_inputs(33)
    slots = torch.arange(33)
    rotated = [apply_rope(x, slots, THETA) for x in (query, key)]
    expected = grouped_softmax_attention(*rotated, value, SIZE)
    new = torch.stack([query[row, start : start + 24] for row, start in enumerate(held)])
    output = retrieving_attention(
        new,
        apply_rope(key, slots % (SIZE + 1), THETA),
        value,
        torch.tensor(held),
        chunk_size=SIZE,
        top_k=9,
        local_chunks=0,
        max_distance=9,
        rope_theta=THETA,
    )
    for row, start in enumerate(held):
        torch.testing.assert_close(output[row], expected[row, start : start + 24], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("top_k", "local_chunks", "max_distance"), [(2, 1, 3), (1, 0, 2), (3, 2, 1)])
@torch.no_grad()
def test_retrieval(top_k, local_chunks, max_distance):
    """Local chunks, then those of the highest landmark scores, positions no further away than the furthest."""
    query, key, value = make_inputs(40)
    slots = torch.arange(40)
    inside = apply_rope(key, slots % (SIZE + 1), THETA)
    output = retrieving_attention(
        query,
        inside,
        value,
        torch.zeros(2, dtype=torch.long),
        chunk_size=SIZE,
        top_k=top_k,
        local_chunks=local_chunks,
        max_distance=max_distance,
        rope_theta=THETA,
    )
    for slot in range(40):
        chunk = slot // (SIZE + 1)
        distance = (chunk - slots // (SIZE + 1)).clamp(0, max_distance)
        # As seen by this query: each chunk moved to where it is taken to lie.
        positions = (max_distance - distance) * (SIZE + 1) + slots % (SIZE + 1)
        seen_keys = apply_rope(key, positions, THETA)
        asking = apply_rope(query[:, slot : slot + 1], positions[slot : slot + 1], THETA)
        seen = torch.zeros_like(query)
        seen[:, slot] = asking[:, 0]

        def chosen(row, head, at, slot=slot, chunk=chunk, keys=seen_keys, query=seen):
            if at != slot:
                return []
            scores = [float(keys[row, c * 5 + 4, head // 2] @ query[row, slot, head]) for c in range(chunk)]
            local = list(range(max(chunk - local_chunks, 0), chunk))
            others = sorted(range(chunk - len(local)), key=lambda c: -scores[c])
            return local + others[:top_k]

        expected = slot_by_slot(seen[:, : slot + 1], seen_keys, value, SIZE, chosen)[:, slot]
        torch.testing.assert_close(output[:, slot], expected, rtol=1e-5, atol=1e-6)
