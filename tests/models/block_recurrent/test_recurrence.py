"""The recurrent cell against its equations, block by block and head by head, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.layers.recurrent_cell import RecurrentCell


@pytest.fixture
def cell() -> RecurrentCell:
    cell = RecurrentCell(8, 2, 1, 4, 6, "alibi", 1e4, num_states=3, block_size=5, eps=1e-5).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    return cell


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two heads of (n, 4) queries over one head of (m, 4) keys, side by side."""
    return torch.cat([(q @ key.T / 2).softmax(-1) @ value for q in query.split(4, -1)], -1)


def by_hand(cell: RecurrentCell, text: Tensor) -> tuple[Tensor, Tensor]:
    """What the cross-attention to the state adds to each token of (n, 8), and the state at the end."""
    state, added = cell.first_state, []
    for block in text.split(5):
        seen = cell.state_norm(state + cell.state_ids)
        memory = cell.state_k_proj(seen), cell.state_v_proj(seen)
        added.append(cell.cross_o_proj(attend(cell.token_to_state_q_proj(block), *memory)))
        if len(block) == 5:
            own = attend(cell.state_to_state_q_proj(seen), *memory)
            read = attend(cell.state_to_token_q_proj(seen), cell.k_proj(block), cell.v_proj(block))
            gate = cell.gate_bias.sigmoid()
            state = gate * state + (1 - gate) * cell.state_o_proj(torch.cat([own, read], -1))
    return torch.cat(added), state


@pytest.mark.parametrize("length", [1, 5, 13])
def test_states_and_gradients(cell, length):
    text = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    output, block = cell(text, None, None, None)
    added, states = zip(*(by_hand(cell, row) for row in text), strict=True)
    expected = cell.attend(*cell.project(text), None) + torch.stack(added)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)  # a bias is float32
    torch.testing.assert_close(block.state, torch.stack(states), rtol=1e-9, atol=1e-9)
    assert block.lengths.tolist() == [length % 5] * 2
    ours, wanted = (torch.autograd.grad(x.square().sum(), text)[0] for x in (output, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_far_tokens_are_remembered(make_baseline):
    """A token beyond all windows changes later logits, by way of the state alone."""
    model = make_baseline("block_recurrent", sliding_window=3)
    ids = torch.randint(1, 50, (1, 60), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 7) % 50
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits)[:, 30:].abs().max()
    assert difference > 1e-6
