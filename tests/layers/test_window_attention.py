"""Window attention as a layer: positions are counted from the keys at hand, and a state may hold any past."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drt.layers.window_attention import WindowAttention
from drt.ops.window_attention import apply_rope

WINDOW = 9


class State:
    """Keeps every key and value, or the last few."""

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, None]:
        new = (key_states, value_states)
        if self.held is not None:
            new = tuple(torch.cat(pair, 1) for pair in zip(self.held, new, strict=True))
        self.held = new if self.keep is None else tuple(x[:, x.shape[1] - self.keep :] for x in new)
        return *new, None


def make(position: str, window: int = WINDOW) -> WindowAttention:
    return WindowAttention(16, 4, 2, 4, window, position, 10000.0).double()


@pytest.mark.parametrize("position", ["alibi", "rope"])
@pytest.mark.parametrize("keep", [WINDOW - 1, 30, None])
@torch.no_grad()
def test_slices_give_what_one_pass_gives(position: str, keep: int | None) -> None:
    layer, hidden = make(position), torch.randn(2, 80, 16, dtype=torch.float64)
    state = State(keep)
    parts = [layer(part, state) for part in hidden.split([40, 1, 1, 13, 25], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(hidden))


@pytest.mark.parametrize("position", ["alibi", "rope"])
@torch.no_grad()
def test_a_long_past_costs_no_precision(position: str) -> None:
    """In float32, after 20,000 positions, the error is that of a fresh start."""
    exact_layer = make(position)
    layer = make(position).float()
    layer.load_state_dict({name: x.float() for name, x in exact_layer.state_dict().items()})
    exact_layer.load_state_dict({name: x.double() for name, x in layer.state_dict().items()})
    hidden = torch.randn(1, 20_000, 16)
    last = hidden[:, -50:]
    expected = exact_layer(last.double())[:, WINDOW:]  # the first of them see what came before

    def error(actual: Tensor) -> float:
        return float((actual[:, -50 + WINDOW :] - expected).abs().max())

    fresh = error(layer(last))
    assert error(layer(hidden)) <= 4 * fresh
    state = State(WINDOW - 1)
    parts = [layer(part, state) for part in hidden.split([19_000, 900, 50, 50], 1)]
    assert error(parts[-1]) <= 4 * fresh


@torch.no_grad()
def test_rope_is_that_of_absolute_positions() -> None:
    """Counting anew in every pass changes nothing: written out with positions from a far offset."""
    layer, hidden = make("rope", window=12), torch.randn(1, 12, 16, dtype=torch.float64)
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, 4)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    positions = torch.arange(10**7, 10**7 + 12)
    query, key = (apply_rope(x, positions, 10000.0) for x in (query, key))
    key, value = key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 2
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    expected = layer.o_proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2))
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_positions_matter() -> None:
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    for position in ("alibi", "rope"):
        layer = make(position)
        assert (layer.alibi_slopes is None) == (position == "rope")
        swapped = hidden[:, [1, 0, *range(2, 8)]]
        assert (layer(swapped)[:, -1] - layer(hidden)[:, -1]).abs().max() > 1e-6
