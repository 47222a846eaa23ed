"""Padding on either side, several documents in a row, and what a cache has read: in DRT and every baseline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_baseline) -> PreTrainedModel:
    return make_baseline(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (3, 45), generator=torch.Generator().manual_seed(1))


def masked(*rows: tuple[int, int]) -> Tensor:
    """(B, 45): ones from .. to of each row."""
    mask = torch.zeros(len(rows), 45, dtype=torch.long)
    for row, (first, last) in enumerate(rows):
        mask[row, first:last] = 1
    return mask


@pytest.mark.parametrize("training", [False, True])
def test_padding_behind_a_row_is_ignored(model, ids, training):
    model.train(training)
    spans = [(0, 45), (0, 21), (4, 30)]
    out = model(ids, attention_mask=masked(*spans), use_cache=False)
    for row, (first, last) in enumerate(spans):
        alone = model(ids[row : row + 1, first:last], use_cache=False).logits[0]
        torch.testing.assert_close(out.logits[row, first:last], alone, **TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spans", [[(0, 45), (0, 21), (0, 30)], [(0, 45), (24, 45), (15, 45)]], ids=str)
def test_a_padded_batch_has_the_loss_of_its_rows(model, ids, spans, training):
    """On the left, too: what stands before a row's first token has seen it, and is not scored against it."""
    mask = masked(*spans)
    model.train(training)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [ids[row : row + 1, first:last] for row, (first, last) in enumerate(spans)]
    losses = [model(part, labels=part).loss * (part.shape[1] - 1) / (44 + 20 + 29) for part in parts]
    torch.testing.assert_close(loss, sum(losses), rtol=1e-5, atol=1e-5)
    sum(losses).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_without_being_told_a_cache_is_made_only_where_it_can_be_gone_on_with(model, ids):
    padded = masked((0, 45), (0, 21), (0, 30))
    assert model(ids).past_key_values is not None
    assert model(ids, attention_mask=padded.flip(1)).past_key_values is not None
    assert model(ids, attention_mask=padded).past_key_values is None
    assert model(ids, position_ids=torch.arange(45) % 20).past_key_values is None
    with pytest.raises(ValueError, match=r"left padding .* got a zero after a one"):
        model(ids, attention_mask=padded, use_cache=True)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="left padding"):
        model(ids, attention_mask=padded, past_key_values=cache)
    with pytest.raises(ValueError, match="begin again at 0: pass use_cache=False"):
        model(ids, position_ids=torch.arange(45) % 20, use_cache=True)
    with pytest.raises(ValueError, match="got a zero between ones in row 2"):
        model(ids, attention_mask=masked((0, 45), (0, 45), (0, 20)) | masked((0, 1), (0, 1), (30, 40)))


@pytest.mark.parametrize("training", [False, True])
def test_documents_packed_into_a_row_see_nothing_of_each_other(model, ids, training):
    """Positions begin again at 0, as packing collators say it; padding may lie around them."""
    model.train(training)
    documents = [(0, 0, 10), (0, 10, 11), (0, 11, 45), (1, 3, 30), (1, 30, 41), (2, 0, 45)]
    positions = torch.zeros(3, 45, dtype=torch.long)
    for row, first, last in documents:
        positions[row, first:last] = torch.arange(last - first)
    mask = masked((0, 45), (3, 41), (0, 45))
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    for row, first, last in documents:
        alone = model(ids[row : row + 1, first:last], use_cache=False).logits[0]
        torch.testing.assert_close(out.logits[row, first:last], alone, **TOLERANCE)
    kept = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=4).logits
    torch.testing.assert_close(kept, out.logits[:, -4:], **TOLERANCE)
    chosen = torch.tensor([40, 2])
    kept = model(
        ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=chosen
    ).logits
    torch.testing.assert_close(kept, out.logits[:, chosen], **TOLERANCE)


def test_packed_documents_train_as_they_do_alone(model, ids):
    """No document's first token is scored against the end of the one before, nor do chunk ends move."""
    model.train()
    lengths, row = [10, 21, 14], ids[:1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.zeros(1, 45, dtype=torch.bool)
    ends[0, [4, 12, 40]] = True
    model(row, position_ids=positions, labels=row, chunk_ends=ends).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part, closes in zip(row.split(lengths, 1), ends.split(lengths, 1), strict=True):
        loss = model(part, labels=part, chunk_ends=closes).loss
        (loss * (part.shape[1] - 1) / (45 - len(lengths))).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_positions_that_say_what_is_known_change_nothing(model, ids):
    expected = model(ids, use_cache=False).logits
    for positions in (torch.arange(45), 7 + torch.arange(45)[None], torch.arange(45).expand(3, -1)):
        torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, expected)
    mask = masked((0, 20), (5, 20), (20, 20))[:, :20]
    cache = model(ids[:, :20], attention_mask=mask).past_key_values
    for column, start in ((20, [20, 15, 0]), (23, [23, 23, 23]), (26, [26, 21, 6])):
        positions = torch.tensor(start).unsqueeze(1) + torch.arange(3)
        model(ids[:, column : column + 3], position_ids=positions, past_key_values=cache)
    again = torch.arange(16) + torch.tensor([[29], [0], [9]])
    with pytest.raises(ValueError, match=r"must go on from the 24 tokens .* of row 1, got 0"):
        model(ids[:, 29:], position_ids=again, past_key_values=cache)


@torch.no_grad()
def test_a_mask_must_say_of_what_was_read_what_it_was_read_as(model, ids):
    """What lies in a cache cannot be masked out of it afterwards, nor padding turned into text."""
    first = masked((0, 45), (5, 45), (0, 45))
    cache = model(ids[:, :20], attention_mask=first[:, :20]).past_key_values
    model(ids[:, 20:25], past_key_values=cache, attention_mask=first[:, :25])
    rows = torch.tensor([1, 0])
    cache.select_rows(rows)
    for row, column, was in ((0, 4, "padding"), (1, 22, "a token")):
        mask = first[rows][:, :30].clone()
        mask[row, column] = 1 - mask[row, column]
        read = f"column {column} of row {row} was read as {was}"
        with pytest.raises(ValueError, match=read):
            model(ids[rows, 25:30], past_key_values=cache, attention_mask=mask)
    out = model(ids[rows, 25:30], past_key_values=cache, attention_mask=first[rows][:, :30])
    alone = model(ids[1:2, 5:30], use_cache=False).logits[0, -5:]
    torch.testing.assert_close(out.logits[0], alone, **TOLERANCE)
