"""Moving slots, and the two forms in which a layer reads chunks."""

from __future__ import annotations

import torch

from drt.layers.grouped_cross_attention import GroupedCrossAttention, RetrievedMemory, rearrange
from drt.ops.grouped_cross_attention import gather_chunks

# Two rows of five slots into two rows of four: some slots are dropped, some places stay empty.
INDEX = torch.tensor([[3, 0, -1, 4], [6, -1, 2, 9]])
INVERSE = torch.tensor([[1, -1, 6, 0, 3], [-1, 4, -1, -1, 7]])


def test_rearrange_moves_slots():
    tensor = torch.randn(2, 5, 3)
    moved = rearrange(tensor, INDEX, INVERSE)
    for row, column in INDEX.ge(0).nonzero().tolist():
        assert torch.equal(moved[row, column], tensor.flatten(0, 1)[INDEX[row, column]])
    for row, column in INVERSE.ge(0).nonzero().tolist():
        assert torch.equal(moved.flatten(0, 1)[INVERSE[row, column]], tensor[row, column])


def test_the_gradient_goes_back_the_same_way():
    """The backward pass gathers by the inverse index; scattering by the index would give the same."""
    tensor, incoming = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 4, 3)
    (gradient,) = torch.autograd.grad(rearrange(tensor, INDEX, INVERSE), tensor, incoming)
    kept = INDEX.flatten() >= 0
    expected = torch.zeros(10, 3).index_add(0, INDEX.flatten()[kept], incoming.flatten(0, 1)[kept])
    torch.testing.assert_close(gradient, expected.view(2, 5, 3))
    assert gradient[INVERSE < 0].count_nonzero() == 0


def test_rearrange_there_and_back():
    tensor = torch.randn(2, 5, 3)
    back = rearrange(rearrange(tensor, INDEX, INVERSE), INVERSE, INDEX)
    assert torch.equal(back[INVERSE >= 0], tensor[INVERSE >= 0])


def test_rearrange_is_differentiated_by_finite_differences():
    def move(tensor):
        return rearrange(tensor, INDEX, INVERSE).masked_fill((INDEX < 0).unsqueeze(-1), 0)

    assert torch.autograd.gradcheck(move, torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True))


def test_chunks_at_hand_and_chunks_read_before_give_the_same():
    layer = GroupedCrossAttention(hidden_size=16, num_heads=4, head_dim=4, sink=True, eps=1e-5)
    hidden = torch.randn(2, 7, 16)
    keys, values = torch.randn(2, 2, 3, 5, 2, 4)  # 3 chunks of 5 tokens
    lengths = torch.tensor([[5, 2, 4], [1, 5, 3]])
    indices = torch.tensor([[[-1, -1], [0, -1], [2, 1]], [[1, 0], [2, 0], [-1, 1]]])
    weights = torch.rand(2, 3, 2).masked_fill(indices < 0, 0)
    # Three blocks of three query slots for seven positions: the last two slots are empty.
    position = torch.arange(9).where(torch.arange(9) < 7, -1)
    index = torch.stack([position, (position + 7).where(position >= 0, -1)])
    inverse = torch.stack([torch.arange(7), torch.arange(9, 16)])
    at_hand = RetrievedMemory(keys, values, lengths, indices, weights)
    slots = lengths.gather(1, indices.clamp_min(0).flatten(1)).view_as(indices).masked_fill(indices < 0, 0)
    read = RetrievedMemory(
        gather_chunks(keys, indices), gather_chunks(values, indices), slots, indices, weights
    )
    output = layer(hidden, at_hand, index, inverse)
    assert output.shape == hidden.shape
    torch.testing.assert_close(layer(hidden, read, index, inverse), output)
    assert output[0, :3].count_nonzero() == 0, "the first block of the first row retrieved nothing"
    assert output[0, 3:].abs().amax(-1).min() > 0
