"""Chunks that travel from elsewhere: when they are asked for, and when they are waited for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from drt.memory import DeviceStore, GatheredChunks
from drt.models.drt import DRTCache, DRTForCausalLM


class Travelling(DeviceStore):
    """Chunks that are on their way until they are waited for; notes both."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def prefetch(self, chunk_indices: Tensor) -> Callable[[], GatheredChunks]:
        self.events.append("begin")
        arrive = super().prefetch(chunk_indices)

        def noted() -> GatheredChunks:
            self.events.append("wait")
            return arrive()

        return noted


@pytest.mark.parametrize("layers", [[2, 2], [1, 3]])
def test_chunks_travel_while_the_window_is_attended_to(
    make_model: Callable[..., DRTForCausalLM], ids: Tensor, layers: list[int]
) -> None:
    """Of each group: sent for, then the window of its first layer, then waited for; with equal results."""
    model = make_model(num_upper_layers=layers)
    events: list[str] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, given, output: events.append(name)

    for layer in model.model.upper_layers:
        layer.window_attention.register_forward_hook(note("window"))
        layer.grouped_cross_attention.register_forward_hook(note("chunks"))
    with torch.no_grad():
        cache = DRTCache(model.config, Travelling(events))
        logits = model(ids[:, :40], past_key_values=cache, use_cache=True).logits
        later = model(ids[:, 40:], past_key_values=cache, use_cache=True).logits
        groups = [["begin", "window", "wait", "chunks", *["window", "chunks"] * (n - 1)] for n in layers]
        assert events == [*groups[0], *groups[1]] * 2
        plain = DRTCache(model.config)
        for part, wanted in ((ids[:, :40], logits), (ids[:, 40:], later)):
            assert torch.equal(model(part, past_key_values=plain, use_cache=True).logits, wanted)
