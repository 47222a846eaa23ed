"""One pass, segments of any size and token by token give the same logits; ragged rows are as if alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from drt.memory import DeviceStore
from drt.models.drt import DRTCache

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
RULES = [
    {},
    {"landmark_predicts": False},
    {"position_embedding": "rope"},
    {"sink": False, "num_groups": 1},
    {"retrieval_top_k": 5, "chunk_size": 3},
    {"chunk_size": 1},
    {"sliding_window": 1},
    {"retrieval": False},
    {"num_upper_layers": [1, 2]},
]


def read(model, ids, sizes, cache=None, chunk_ends=None, attention_mask=None):
    """Logits of every token, read in slices of the given sizes (the last one repeats)."""
    cache = DRTCache(model.config, DeviceStore(page_size=3)) if cache is None else cache
    logits, start = [], 0
    while start < ids.shape[1]:
        size = sizes[min(len(logits), len(sizes) - 1)]
        part = slice(start, start + size)
        out = model(
            ids[:, part],
            past_key_values=cache,
            use_cache=True,
            chunk_ends=None if chunk_ends is None else chunk_ends[:, part],
            attention_mask=None if attention_mask is None else attention_mask[:, : start + size],
        )
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [[1], [61], [5], [20, 1], [7], [3, 17, 1, 8], [8, 6]])
@torch.no_grad()
def test_slices_equal_one_pass(make_model, ids, rule, sizes):
    model = make_model(**rule)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(read(model, ids, sizes), whole, **TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [[1], [61], [5], [9, 1, 20]])
@torch.no_grad()
def test_slices_equal_one_pass_with_early_closed_chunks(make_model, ids, rule, sizes):
    model = make_model(**rule)
    ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    whole = model(ids, use_cache=False, chunk_ends=ends).logits
    if model.config.chunk_size > 1:
        assert (whole - model(ids, use_cache=False).logits).abs().max() > 0.01  # closing early matters
    torch.testing.assert_close(read(model, ids, sizes, chunk_ends=ends), whole, **TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [[61], [1], [6], [40, 1]])
@torch.no_grad()
def test_a_ragged_row_has_the_logits_it_has_alone(make_model, ids, rule, sizes):
    model = make_model(**rule)
    pads = [0, 17]
    ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    mask = torch.ones_like(ids)
    mask[1, : pads[1]] = 0
    together = read(model, ids, sizes, chunk_ends=ends, attention_mask=mask)
    one_pass = model(ids, use_cache=False, chunk_ends=ends, attention_mask=mask).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:], use_cache=False, chunk_ends=ends[row : row + 1, pad:]).logits
        torch.testing.assert_close(together[row, pad:], alone[0], **TOLERANCE)
        torch.testing.assert_close(one_pass[row, pad:], alone[0], **TOLERANCE)


@torch.no_grad()
def test_padding_between_two_passes_is_no_text(make_model, ids):
    """Further turns of a batch may be ragged too: padded at the left of the new part."""
    model = make_model()
    cache = DRTCache(model.config, DeviceStore(page_size=3))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:29] = 0
    together = read(model, ids[:, :40], [20, 4, 16], cache, attention_mask=mask)
    for row in (0, 1):
        text = ids[row : row + 1, :40][:, mask[row].bool()]
        alone = model(text, use_cache=False).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, **TOLERANCE)


@torch.no_grad()
def test_the_future_is_not_seen(make_model, ids):
    model = make_model()
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 50
    ours, other = model(ids, use_cache=False).logits, model(changed, use_cache=False).logits
    torch.testing.assert_close(ours[:, :40], other[:, :40])
    assert (ours[:, 40:] - other[:, 40:]).abs().max() > 0.01


@torch.no_grad()
def test_far_chunks_are_read(make_model, ids):
    """A token far beyond every window changes late logits, and does not when retrieval is off."""
    for retrieval in (True, False):
        model = make_model(retrieval=retrieval, sliding_window=4, retrieval_top_k=8, chunk_size=7)
        changed = ids.clone()
        changed[:, 3] = (changed[:, 3] + 7) % 50
        difference = (
            (model(ids, use_cache=False).logits - model(changed, use_cache=False).logits)[:, 40:].abs().max()
        )
        assert (difference > 1e-4) == retrieval


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen(make_model, ids):
    model = make_model()
    rows = torch.tensor([1, 1, 0])
    expected = model(ids[rows], use_cache=False).logits
    cache = DRTCache(model.config, DeviceStore(page_size=3))
    read(model, ids[:, :33], [11], cache)
    cache.select_rows(rows)
    torch.testing.assert_close(read(model, ids[rows][:, 33:], [9], cache), expected[:, 33:], **TOLERANCE)


@torch.no_grad()
def test_reset_forgets(make_model, ids):
    model = make_model()
    cache = DRTCache(model.config)
    first = read(model, ids, [20], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(read(model, ids, [20], cache), first)


def test_every_parameter_gets_a_gradient(make_model, ids):
    model = make_model()
    model(ids, labels=ids).loss.backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0
    ]
    assert not silent


def test_retrieval_gradient_is_the_finite_difference(make_model, ids):
    """d loss / d retrieval score, by way of the temperature: float64, central differences."""
    model = make_model(retrieval_top_k=3).double()
    parameter = model.model.retrievers[1].log_temperature

    def loss():  # the library's loss is computed in float32
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    step = 1e-3
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step
            losses.append(loss())
            parameter -= sign * step
    expected = (losses[0] - losses[1]) / (2 * step)
    assert abs(float(expected)) > 1e-6
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-2, atol=0)


@torch.no_grad()
def test_the_loss_of_a_segment_sees_what_a_given_cache_holds(make_model, ids):
    model = make_model()
    whole, cache = model(ids, use_cache=False).logits, DRTCache(model.config)
    for start, stop in ((0, 30), (30, 61)):
        part = ids[:, start:stop]
        found = model(part, labels=part, past_key_values=cache).loss
        expected = F.cross_entropy(whole[:, start : stop - 1].flatten(0, 1), part[:, 1:].flatten())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert model(ids, labels=ids).past_key_values is None, "nobody asked for one"
