"""Summaries: generated from the document and its cue, scored as text, learned in fine-tuning."""

from __future__ import annotations

import pytest
import torch
from transformers import ByT5Tokenizer

from drt.data.summaries import SummaryPair, summary_batch, summary_prompt
from drt.data.tokens import TextCodec
from drt.eval.summarization import evaluate_summaries
from drt.models.drt import DRTConfig, DRTForCausalLM

PAIRS = [SummaryPair("aaaa bbbb " * 8, "the cats sat"), SummaryPair("cccc dddd " * 6, "a dog ran away")]


@pytest.fixture(scope="module")
def trained() -> DRTForCausalLM:
    """A tiny model that has learned the two summaries by heart, on batches of the collator."""
    torch.manual_seed(0)
    config = DRTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_lower_layers=1,
        num_upper_layers=1,
        num_encoder_layers=1,
        num_attention_heads=2,
        chunk_size=15,
        retrieval_top_k=2,
        sliding_window=24,
    )
    model = DRTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = summary_batch(PAIRS, TextCodec(ByT5Tokenizer(extra_ids=0)), longest=200, end=1)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


def test_what_was_learned_is_generated_and_scores_one(trained: DRTForCausalLM) -> None:
    read: list[int] = []
    tokenizer = ByT5Tokenizer(extra_ids=0)
    records = list(
        evaluate_summaries(
            trained, tokenizer, PAIRS, checkpoint="tiny", data="two", segment_size=20, on_progress=read.append
        )
    )
    assert [record.generated for record in records] == [pair.summary for pair in PAIRS]
    assert all(record.scores == {"rouge1": 1, "rouge2": 1, "rougeLsum": 1} for record in records)
    assert [record.length for record in records] == [
        len(summary_prompt(p, TextCodec(tokenizer))) for p in PAIRS
    ]
    assert sum(read) == sum(record.length for record in records)
    assert [(r.task, r.index, r.expected) for r in records] == [
        ("summarization", i, [pair.summary]) for i, pair in enumerate(PAIRS)
    ]


def test_rouge_by_hand_on_stemmed_words(trained: DRTForCausalLM) -> None:
    """`the cats sat` against `a cat sat down`: words cat, sat agree (3 and 4 words), and the pair `cat sat`."""
    pair = SummaryPair(PAIRS[0].document, "a cat sat down")
    (record,) = evaluate_summaries(trained, ByT5Tokenizer(extra_ids=0), [pair], checkpoint="tiny", data="one")
    assert record.generated == "the cats sat"
    assert record.scores["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert record.scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_errors_of_generation_are_errors(trained: DRTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trained, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(evaluate_summaries(trained, ByT5Tokenizer(extra_ids=0), PAIRS, checkpoint="tiny", data="two"))
