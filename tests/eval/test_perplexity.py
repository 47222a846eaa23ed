"""Perplexity: what is streamed is what one pass gives, bits per byte by hand, positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from drt.errors import DRTError
from drt.eval.documents import Document
from drt.eval.perplexity import (
    evaluate_perplexity,
    score_by_position,
    token_losses,
    total_score,
)
from drt.eval.results import PerplexityRecord
from drt.models.drt import DRTForCausalLM

LENGTHS = (700, 90, 333, 2)  # several buckets, fewer tokens than a chunk's worth of windows, hardly any


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    return [
        Document(f"d{i}", i, rng.integers(3, 259, size=length).astype(np.uint16))
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def uniform(model: DRTForCausalLM) -> DRTForCausalLM:
    """A model that thinks every token equally likely."""
    flat = DRTForCausalLM(model.config)
    flat.load_state_dict(model.state_dict())
    flat.model.norm.weight.data.zero_()
    return flat.eval()


def in_one_pass(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").numpy()


def evaluate(model: PreTrainedModel, documents: list[Document], **options: Any) -> list[PerplexityRecord]:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    records = evaluate_perplexity(model, tokenizer, documents, checkpoint="tiny", data="random", **options)
    return sorted(records, key=lambda record: record.index)


@pytest.mark.parametrize("segment_size", [1, 40, 97, 10_000])
def test_streamed_losses_are_those_of_one_pass(
    model: DRTForCausalLM, documents: list[Document], segment_size: int
) -> None:
    rows = [document.tokens for document in documents if segment_size > 1 or len(document.tokens) < 100]
    for row, losses in zip(rows, token_losses(model, rows, segment_size), strict=True):
        assert losses.shape == (len(row) - 1,)
        np.testing.assert_allclose(losses, in_one_pass(model, row), atol=2e-4)


def test_a_model_of_another_kind_streams_its_own_cache(documents: list[Document]) -> None:
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    llama = LlamaForCausalLM(config).eval()
    rows = [document.tokens for document in documents]
    for row, losses in zip(rows, token_losses(llama, rows, 50), strict=True):
        np.testing.assert_allclose(losses, in_one_pass(llama, row), atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 4, "segment_size": 200}])
def test_records_add_up_to_one_pass_however_the_documents_are_read(
    model: DRTForCausalLM, documents: list[Document], options: dict[str, int]
) -> None:
    for record, document in zip(evaluate(model, documents, **options), documents, strict=True):
        expected = in_one_pass(model, document.tokens)
        assert (record.task, record.data, record.document, record.index) == (
            "perplexity",
            "random",
            document.name,
            document.index,
        )
        assert record.length == len(document.tokens) == sum(record.tokens) + 1
        assert sum(record.losses) == pytest.approx(expected.sum(), rel=1e-5)
        starts = [1, *record.positions]
        for start, end, tokens, loss in zip(
            starts, record.positions, record.tokens, record.losses, strict=False
        ):
            assert tokens == min(end, record.length) - start
            assert loss == pytest.approx(expected[start - 1 : end - 1].sum(), rel=1e-5)
        assert record.batch_size == options.get("batch_size", 1)
        assert record.seconds > 0
        assert record.peak_device_bytes is None


def test_long_documents_come_first_and_every_token_is_progress(
    model: DRTForCausalLM, documents: list[Document]
) -> None:
    read: list[int] = []
    records = evaluate_perplexity(
        model,
        ByT5Tokenizer(extra_ids=0),
        documents,
        checkpoint="tiny",
        data="random",
        batch_size=3,
        segment_size=300,
        on_progress=read.append,
    )
    assert [record.index for record in records] == [0, 2, 1, 3]
    assert sum(read) == sum(LENGTHS)
    assert min(read) > 0


def test_a_uniform_model_needs_log2_of_the_vocabulary(
    uniform: DRTForCausalLM, documents: list[Document]
) -> None:
    score = total_score(evaluate(uniform, documents))
    assert score.tokens == score.bytes == sum(LENGTHS) - len(LENGTHS)
    assert score.bits_per_byte == pytest.approx(math.log2(259), rel=1e-6)
    assert score.perplexity == pytest.approx(259, rel=1e-5)


def test_bits_per_byte_by_hand(uniform: DRTForCausalLM) -> None:
    """`é` is two bytes, the end of the document is a token without bytes, and the first token is not predicted."""
    tokens = np.array([*ByT5Tokenizer(extra_ids=0).encode("aé!", add_special_tokens=False), 1])
    (record,) = evaluate(uniform, [Document("d", 0, tokens)])
    assert (record.tokens, record.bytes) == ([4], [3])
    assert total_score([record]).bits_per_byte == pytest.approx(4 * math.log2(259) / 3, rel=1e-6)
    assert total_score([record]).perplexity == pytest.approx(259, rel=1e-5)


def make(length: int, positions: list[int], losses: list[float], **changes: Any) -> PerplexityRecord:
    cuts = [1, *(min(end, length) for end in positions)]
    tokens = [int(n) for n in np.diff(cuts)]
    values: dict[str, Any] = {
        "task": "perplexity",
        "checkpoint": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "data": "random",
        "document": "d",
        "index": 0,
        "length": length,
        "positions": positions,
        "tokens": tokens,
        "bytes": [2 * n for n in tokens],
        "losses": losses,
        "seconds": 1.0,
        "peak_rss_bytes": 1,
        "peak_device_bytes": None,
        "batch_size": 1,
    }
    return PerplexityRecord(**values | changes)


def test_positions_are_merged_over_documents() -> None:
    records = [
        make(40, [8, 16, 32, 64], [7, 8, 16, 8]),
        make(12, [8, 16], [14, 8]),
        make(33, [8, 16, 32, 64], [1] * 4),
    ]
    scores = score_by_position(records, [16, 32])
    assert [(key, s.tokens, s.bytes, s.loss) for key, s in scores.items()] == [
        ((0, 16), 15 + 11 + 15, 2 * 41, 15 + 22 + 2),
        ((16, 32), 32, 64, 17),
        ((32, None), 9, 18, 9),
    ]
    assert list(score_by_position(records)) == [(0, 8), (8, 16), (16, 32), (32, 64)]
    assert list(score_by_position(records, [64, 128])) == [(0, 64)]
    assert list(score_by_position([make(16, [8, 16], [7, 8])], [16])) == [(0, 16)]
    assert list(score_by_position(records[:1], [16, 48])) == [(0, 16), (16, 48)]


def test_positions_that_were_not_kept_are_refused() -> None:
    with pytest.raises(DRTError, match=r"made without 10; they can be shown at 8, 16, 32, 64"):
        score_by_position([make(40, [8, 16, 32, 64], [7, 8, 16, 8])], [10, 32])


def test_records_of_other_positions_are_shown_where_all_have_ends() -> None:
    records = [make(40, [8, 16, 32, 64], [7, 8, 16, 8]), make(40, [10, 16, 32, 64], [9, 6, 16, 8])]
    assert list(score_by_position(records)) == [(0, 16), (16, 32), (32, 64)]


def test_an_end_token_alone_is_no_bucket() -> None:
    record = make(17, [8, 16, 32], [7, 8, 1])
    record.bytes[-1] = 0
    assert list(score_by_position([record])) == [(0, 8), (8, 16)]


def test_own_positions_are_kept(uniform: DRTForCausalLM, documents: list[Document]) -> None:
    records = evaluate(uniform, documents, positions=[100, 300, 5000])
    assert records[0].positions == [100, 256, 300, 512, 1024]
    assert list(score_by_position(records, [100, 300, 5000])) == [(0, 100), (100, 300), (300, 5000)]


def test_bad_arguments(model: DRTForCausalLM, documents: list[Document]) -> None:
    for options in ({"segment_size": 0}, {"batch_size": 0}, {"positions": [0]}):
        with pytest.raises(ValueError, match=r"must be >= 1"):
            evaluate(model, documents, **options)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        evaluate(model, documents)
    model.eval()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_losses(model: DRTForCausalLM, documents: list[Document]) -> None:
    rows = [document.tokens for document in documents]
    expected = token_losses(model, rows, 100)
    found = token_losses(model.to("cuda"), rows, 100)
    model.to("cpu")
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-3)
