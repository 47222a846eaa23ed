"""The chunk encoder: what is no token counts nothing, and positions are counted from the right end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.layers.chunk_encoder import ChunkEncoder, ChunkEncoderLayer

SIZE, WIDTH = 6, 16


@pytest.fixture
def encoder() -> ChunkEncoder:
    encoder = ChunkEncoder(2, WIDTH, 24, 4, 2, 4, 10000.0, 1e-5, 1e-6).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.mul_(3)
    return encoder


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


@torch.no_grad()
def test_what_lies_beyond_a_chunk_counts_nothing(encoder):
    tokens, landmarks, lengths = draw(2, 3, SIZE), draw(2, 3), torch.tensor([[6, 1, 4], [3, 6, 2]])
    filled = torch.arange(SIZE) < lengths.unsqueeze(-1)
    encoded, keys = encoder(tokens, landmarks, lengths)
    for other in (0.0, 1e4):
        changed = tokens.masked_fill(~filled.unsqueeze(-1), other)
        encoded_again, keys_again = encoder(changed, landmarks, lengths)
        torch.testing.assert_close(keys_again, keys)
        torch.testing.assert_close(encoded_again[filled], encoded[filled])


@torch.no_grad()
def test_a_short_chunk_is_the_full_chunk_of_an_encoder_of_its_size(encoder):
    """Only distances matter to RoPE: counted from the right end they are those of a chunk that is just so long."""
    tokens, landmarks = draw(1, 1, SIZE), draw(1, 1)
    for length in range(1, SIZE + 1):
        encoded, keys = encoder(tokens, landmarks, torch.tensor([[length]]))
        alone, key = encoder(tokens[:, :, :length], landmarks, None)
        torch.testing.assert_close(encoded[:, :, :length], alone)
        torch.testing.assert_close(keys, key)


@torch.no_grad()
def test_positions_lie_at_the_right_end(encoder):
    seen = []
    handle = encoder.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    encoder(draw(1, 2, SIZE), draw(1, 2), torch.tensor([[2, 6]]))
    encoder(draw(1, 2, SIZE), draw(1, 2), None)
    handle.remove()
    assert seen[0][0, [0, 1, SIZE]].tolist() == [4, 5, 6]
    assert seen[0][1].tolist() == seen[1].tolist() == list(range(SIZE + 1))


@torch.no_grad()
def test_full_lengths_are_no_lengths(encoder):
    tokens, landmarks = draw(2, 3, SIZE), draw(2, 3)
    given = encoder(tokens, landmarks, torch.full((2, 3), SIZE))
    for got, want in zip(given, encoder(tokens, landmarks, None), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_chunks_are_encoded_apart_and_both_ways(encoder):
    tokens, landmarks = draw(1, 3, SIZE), draw(1, 3)
    encoded, keys = encoder(tokens, landmarks, None)
    changed = tokens.clone()
    changed[0, 1, -1] += 1
    encoded_again, keys_again = encoder(changed, landmarks, None)
    for chunk in (0, 2):
        assert torch.equal(encoded_again[:, chunk], encoded[:, chunk])
        assert torch.equal(keys_again[:, chunk], keys[:, chunk])
    assert (encoded_again[0, 1] - encoded[0, 1]).abs().amax(-1).min() > 1e-6, "the first token sees the last"
    assert (keys_again[0, 1] - keys[0, 1]).abs().max() > 1e-6


@torch.no_grad()
def test_order_matters(encoder):
    tokens, landmarks = draw(1, 1, SIZE), draw(1, 1)
    assert (
        encoder(tokens.flip(2), landmarks, None)[1] - encoder(tokens, landmarks, None)[1]
    ).abs().max() > 1e-6


def test_slots_beyond_a_chunk_get_no_gradient(encoder):
    tokens = draw(1, 2, SIZE).requires_grad_()
    encoded, keys = encoder(tokens, draw(1, 2), torch.tensor([[4, 6]]))
    (gradient,) = torch.autograd.grad(keys.sum() + encoded[:, 0, :4].sum() + encoded[:, 1].sum(), tokens)
    assert gradient[0, 0, 4:].count_nonzero() == 0
    assert gradient[0, 0, :4].abs().amax(-1).min() > 0
    assert gradient[0, 1].abs().amax(-1).min() > 0


def test_no_chunk_runs_no_layer(encoder, monkeypatch):
    monkeypatch.setattr(ChunkEncoderLayer, "forward", lambda *_: pytest.fail("a layer ran for no chunk"))
    tokens, landmarks = encoder(draw(2, 0, SIZE), draw(2, 0), None)
    assert tokens.shape == (2, 0, SIZE, WIDTH)
    assert landmarks.shape == (2, 0, WIDTH)
