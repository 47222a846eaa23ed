"""The query side of retrieval: the norm, the scale and the learned temperature."""

from __future__ import annotations

import math

import torch

from drt.layers.retriever import Retriever


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Landmark states, landmarks and visible counts."""
    return torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.arange(6).expand(2, -1)


def test_scores_are_those_of_the_normed_state():
    retriever = Retriever(16, top_k=3, eps=1e-5, learned_temperature=False)
    retriever.norm.weight.data.uniform_(0.5, 1.5)
    states, landmarks, visible = draw()
    found = retriever(states, landmarks, visible, gumbel=False)
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * retriever.norm.weight
    scores = normed @ landmarks.transpose(1, 2) / 4  # sqrt(16)
    expected = scores.gather(-1, found.chunk_indices.clamp_min(0)).masked_fill(
        found.chunk_indices < 0, -math.inf
    )
    torch.testing.assert_close(found.scores, expected)
    assert retriever.log_temperature is None


def test_the_temperature_scales_the_scores_and_learns():
    states, landmarks, visible = draw()
    plain = Retriever(16, top_k=3, eps=1e-5, learned_temperature=False)(states, landmarks, visible, False)
    retriever = Retriever(16, top_k=3, eps=1e-5, learned_temperature=True)
    torch.testing.assert_close(retriever(states, landmarks, visible, False), plain)  # it starts at 1
    with torch.no_grad():
        retriever.log_temperature.fill_(math.log(2.5))
    found = retriever(states, landmarks, visible, False)
    torch.testing.assert_close(found.scores, plain.scores * 2.5)
    torch.testing.assert_close(found.chunk_weights[:, 1:], (plain.scores * 2.5)[:, 1:].softmax(-1))
    assert torch.equal(found.chunk_indices, plain.chunk_indices)
    found.chunk_weights[..., 0].sum().backward()
    assert retriever.log_temperature.grad > 0, "a higher temperature prefers the best"


def test_the_temperature_scales_under_the_noise():
    """Noise has one size, so a high temperature selects as no noise does."""
    states, landmarks, visible = draw()
    retriever = Retriever(16, top_k=2, eps=1e-5, learned_temperature=True)
    quiet = retriever(states, landmarks, visible, gumbel=False).chunk_indices
    assert not torch.equal(retriever(states, landmarks, visible, gumbel=True).chunk_indices, quiet)
    with torch.no_grad():
        retriever.log_temperature.fill_(12.0)
    assert torch.equal(retriever(states, landmarks, visible, gumbel=True).chunk_indices, quiet)
