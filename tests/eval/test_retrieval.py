"""The trace of what was retrieved during `generate` against one pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drt.eval.retrieval import RetrievalTrace, Selection
from drt.models.drt import DRTConfig, DRTForCausalLM

CHUNK = 15
NEW = 40  # three selections at least: the prompt's end and two generated chunks


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model: DRTForCausalLM, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(prompt, **{"max_new_tokens": NEW, "do_sample": False} | options)


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
    with RetrievalTrace(model) as trace:
        text = generate(model, prompt, **options)
    expected = in_one_pass(model, text[:, :-1], length)  # nobody reads the last token
    assert_same([one for one in trace.selections if one.columns >= length], expected)
    assert len(expected) == 3
    assert length == 1 or len({tuple(one.chunk_indices[0].tolist()) for one in expected}) > 1
    assert all((one.chunk_weights.diff(dim=1) <= 0).all() for one in expected)


@torch.no_grad()
def test_rows_of_a_ragged_batch_have_the_trace_they_have_alone(model: DRTForCausalLM) -> None:
    lengths = [100, 61, 7]
    ids, mask = torch.zeros(3, 100, dtype=torch.long), torch.zeros(3, 100, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens(length, seed=row)[0], 1
    with RetrievalTrace(model) as trace:
        text = generate(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        expected = in_one_pass(model, text[row : row + 1, 100 - length : -1], length)
        found = [one for one in trace.selections if one.row == row]
        moved = [one._replace(row=0, columns=one.columns - 100 + length) for one in found]
        assert_same(moved, expected)


@torch.no_grad()
def test_a_trace_begins_to_count_where_it_begins_to_watch(model: DRTForCausalLM) -> None:
    text = tokens(100)
    cache = model(text[:, :64], use_cache=True).past_key_values
    with RetrievalTrace(model) as trace:
        model(text[:, 64:80], past_key_values=cache)
        model(inputs_embeds=model.get_input_embeddings()(text[:, 80:]), past_key_values=cache)
    assert [one.columns for one in trace.selections] == [16, 36]  # chunks close at tokens 75 and 90
    model(text, use_cache=True)
    assert len(trace.selections) == 2


def test_what_cannot_be_traced_is_refused(model: DRTForCausalLM) -> None:
    with pytest.raises(ValueError, match="wanted use_cache=True"), RetrievalTrace(model):
        model(tokens(40), use_cache=False)
    model(tokens(40), use_cache=False)  # nobody watches any more
    with pytest.raises(ValueError, match="got one with retrieval=False"):
        RetrievalTrace(DRTForCausalLM(DRTConfig.from_dict(model.config.to_dict() | {"retrieval": False})))
