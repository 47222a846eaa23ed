"""Documents with summaries: what is read, what is scored in fine-tuning."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from drt.data.summaries import CUE, IGNORED, SummaryPair, read_pairs, summary_batch, summary_prompt
from drt.data.tokens import TextCodec
from drt.errors import DRTError

PAIRS = [SummaryPair("A long story of a dog.", "Dog."), SummaryPair("é" * 40, "Accents, many of them.")]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(ByT5Tokenizer(extra_ids=0))


def test_pairs_of_a_file(tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"article": p.document, "highlights": p.summary, "id": 1}) + "\n" for p in PAIRS
    )
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_pairs(tmp_path / name, "article", "highlights") == PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"document": "a", "summary": "b"}\n{"document": "a"}\n',
            r"bad\.jsonl:2: expected a text in the field 'summary'",
        ),
        ("[]\n", r"bad\.jsonl:1: expected a JSON object, got a list"),
        ("{\n", r"bad\.jsonl:1: expected JSON lines"),
        ('{"document": "a", "summary": " "}\n', r"bad\.jsonl:1: expected texts that are not empty"),
        ('{"document": 3, "summary": "b"}\n', r"bad\.jsonl:1: .* 'document', got a number"),
        ('{"document": null, "summary": "b"}\n', r"bad\.jsonl:1: .* 'document', got null"),
        ("", "got an empty file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DRTError, match=message):
        read_pairs(tmp_path / "bad.jsonl")
    with pytest.raises(DRTError, match=r"none\.jsonl: cannot be read"):
        read_pairs(tmp_path / "none.jsonl")


def test_the_loss_is_on_the_summary_and_its_end(codec: TextCodec) -> None:
    batch = summary_batch(PAIRS, codec, longest=200, end=1)
    assert {tensor.shape for tensor in batch.values()} == {(2, 80 + len(CUE) + len(PAIRS[1].summary) + 1)}
    for row, pair in enumerate(PAIRS):
        ids, labels, ends = (batch[name][row] for name in ("input_ids", "labels", "chunk_ends"))
        scored = labels != IGNORED
        assert codec.decode(labels[scored][:-1].numpy()) == pair.summary.encode()
        assert labels[scored][-1] == 1
        assert torch.equal(ids[scored], labels[scored])
        first = int(scored.nonzero()[0])
        assert codec.decode(ids[:first].numpy()) == (pair.document + CUE).encode()
        assert ends.nonzero().tolist() == [[first - 1]], (
            "the chunk closes before the summary, as in generation"
        )
        assert ids[int(scored.nonzero()[-1]) + 1 :].count_nonzero() == 0


def test_documents_are_cut_and_summaries_are_not(codec: TextCodec) -> None:
    batch = summary_batch(PAIRS, codec, longest=50, end=1)
    assert batch["input_ids"].shape == (2, 50)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(p.summary) + 1 for p in PAIRS]
    prompt = summary_prompt(PAIRS[0], codec, 20)
    assert codec.decode(prompt) == (PAIRS[0].document[: 20 - len(CUE)] + CUE).encode()
    assert np.array_equal(summary_prompt(PAIRS[0], codec), codec.encode(PAIRS[0].document + CUE))
    with pytest.raises(ValueError, match="longest must be more than the 11 tokens of the cue, got 8"):
        summary_batch(PAIRS[1:], codec, longest=31, end=1)
    with pytest.raises(ValueError, match="at least one pair"):
        summary_batch([], codec, longest=31, end=1)
