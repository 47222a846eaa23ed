"""The training loss without logits against the library's with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drt.models.common.loss import causal_loss, needs_no_logits
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.window import WindowConfig, WindowForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def build(kind: str) -> DRTForCausalLM | WindowForCausalLM:
    torch.manual_seed(0)
    if kind == "window":
        return WindowForCausalLM(WindowConfig(**SIZES, num_hidden_layers=2, sliding_window=8))
    layers = {"num_lower_layers": 1, "num_upper_layers": 1, "num_encoder_layers": 1}
    return DRTForCausalLM(DRTConfig(**SIZES, **layers, chunk_size=5, retrieval_top_k=2, sliding_window=8))


@pytest.mark.parametrize("kind", ["drt", "window"])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "number", "tensor"])
def test_training_has_the_loss_and_gradients_of_the_logits(kind: str, items: object) -> None:
    model = build(kind)
    ids = torch.randint(0, 40, (2, 21))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    results = []
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(input_ids=ids, labels=labels, num_items_in_batch=items)
        assert (output.logits is None) == training
        output.loss.backward()
        results.append(
            [output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["drt", "window"])
@pytest.mark.parametrize("name", ["ignore_index", "shift_labels"])
def test_training_heeds_what_the_library_heeds(kind: str, name: str) -> None:
    model = build(kind)
    labels = torch.randint(0, 40, (2, 21))
    options = {"ignore_index": int(labels[0, 3]), "shift_labels": labels.flip(1)}
    losses = [
        model.train(training)(input_ids=labels, labels=labels, **{name: options[name]}).loss
        for training in (True, False)
    ]
    torch.testing.assert_close(*losses)
    assert (losses[0] - model(input_ids=labels, labels=labels).loss).abs() > 1e-4


def test_logits_where_someone_may_want_them() -> None:
    head, labels = nn.Linear(4, 6, bias=False), torch.zeros(1, 3, dtype=torch.long)
    model = nn.Module()
    assert needs_no_logits(model.train(), head, labels, 0)
    assert not needs_no_logits(model.train(), head, None, 0)
    assert not needs_no_logits(model.train(), head, labels, 1)
    assert not needs_no_logits(model.train(), nn.Sequential(head), labels, 0), "an adapter's head"
    assert not needs_no_logits(model.eval(), head, labels, 0)
    with torch.no_grad():
        assert not needs_no_logits(model.train(), head, labels, 0)


def test_the_last_token_predicts_nothing() -> None:
    head, states = nn.Linear(4, 6, bias=False), torch.randn(1, 3, 4)
    loss = causal_loss(head, states, torch.tensor([[1, 2, 3]]))
    changed = states.clone()
    changed[:, -1] = 9
    assert causal_loss(head, changed, torch.tensor([[5, 2, 3]])) == loss
