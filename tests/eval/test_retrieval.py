"""The trace of what was retrieved during `generate` against one pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from drt.eval.retrieval import RetrievalTrace, Selection
from drt.models.drt import DRTConfig, DRTForCausalLM

CHUNK = 15
NEW = 40  # three selections at least: the prompt's end and two generated chunks


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(
    model: DRTForCausalLM, prompt: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, list[Selection]]:
    """The whole text, and what was retrieved for it."""
    cache = model.make_cache()
    trace = RetrievalTrace(cache)
    text = model.generate(
        prompt,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([trace]),
        **{"max_new_tokens": NEW, "do_sample": False} | options,
    )
    return text, trace.selections


def in_one_pass(model: DRTForCausalLM, text: torch.Tensor, prompt_length: int) -> list[Selection]:
    """What the chunks from the prompt's last one on retrieve when the text is read at once."""
    ends = torch.zeros_like(text, dtype=torch.bool)
    ends[:, prompt_length - 1] = True
    output = model(text, chunk_ends=ends, use_cache=False, output_retrieval=True)
    first = -(-prompt_length // CHUNK) - 1
    columns = [prompt_length, *range(prompt_length + CHUNK, text.shape[1] + 1, CHUNK)]
    selections = []
    for number, column in enumerate(columns, start=first):
        weights = torch.stack([group[0, number] for group in output.chunk_weights])
        indices = torch.stack([group[0, number] for group in output.chunk_indices])
        order = weights.argsort(dim=1, descending=True, stable=True)
        selections.append(Selection(0, column, indices.gather(1, order), weights.gather(1, order)))
    return selections


def assert_same(found: list[Selection], expected: list[Selection]) -> None:
    assert [selection[:2] for selection in found] == [selection[:2] for selection in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.chunk_indices, other.chunk_indices)
        torch.testing.assert_close(one.chunk_weights, other.chunk_weights, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 22}], ids=["one pass", "segments"])
@pytest.mark.parametrize("length", [100, 105, 1])
def test_the_trace_holds_what_every_chunk_from_the_prompts_end_on_retrieved(
    model: DRTForCausalLM, length: int, options: dict[str, int]
) -> None:
    prompt = tokens(length)
    text, found = generate(model, prompt, **options)
    expected = in_one_pass(model, text[:, :-1], length)  # nobody reads the last token
    assert_same(found, expected)
    assert len(expected) == 3
    assert length == 1 or len({tuple(one.chunk_indices[0].tolist()) for one in expected}) > 1
    assert all((one.chunk_weights.diff(dim=1) <= 0).all() for one in expected)


@torch.no_grad()
def test_rows_of_a_ragged_batch_have_the_trace_they_have_alone(model: DRTForCausalLM) -> None:
    lengths = [100, 61, 7]
    ids, mask = torch.zeros(3, 100, dtype=torch.long), torch.zeros(3, 100, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens(length, seed=row)[0], 1
    text, selections = generate(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        expected = in_one_pass(model, text[row : row + 1, 100 - length : -1], length)
        found = [one for one in selections if one.row == row]
        moved = [one._replace(row=0, columns=one.columns - 100 + length) for one in found]
        assert_same(moved, expected)


@torch.no_grad()
def test_a_trace_notices_what_closes_after_it_was_made(model: DRTForCausalLM) -> None:
    text = tokens(100)
    cache = model(text[:, :64], use_cache=True).past_key_values
    trace = RetrievalTrace(cache)
    mask = torch.ones(1, 100, dtype=torch.long)
    whole = model.generate(
        text[:, 64:],
        attention_mask=mask,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([trace]),
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert [one.columns for one in trace.selections] == [36, 51, 66]
    expected = in_one_pass(model, torch.cat([text[:, :64], whole[:, :-1]], 1), 100)
    assert_same([one._replace(columns=one.columns + 64) for one in trace.selections], expected)


def test_a_model_without_retrieval_is_refused(model: DRTForCausalLM) -> None:
    plain = DRTForCausalLM(DRTConfig.from_dict(model.config.to_dict() | {"retrieval": False})).eval()
    with pytest.raises(ValueError, match="got one with retrieval=False"):
        generate(plain, tokens(40))
