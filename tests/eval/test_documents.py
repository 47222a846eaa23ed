"""Documents of a corpus and of a file, and how many bytes their tokens are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from drt.data.corpus_writer import ShardWriter, write_manifest
from drt.data.tokenizer import describe_tokenizer, train_tokenizer
from drt.errors import DRTError
from drt.eval.documents import ByteCounter, load_documents

TEXT = "Naïve cafés — “quoted” 一頁 😀 and plain words, plain words, plain words. " * 3


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerBase:
    return train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_bytes_of_all_tokens_are_those_of_the_text(
    name: str, tokenizer: PreTrainedTokenizerBase, bpe: PreTrainedTokenizerBase
) -> None:
    chosen = tokenizer if name == "bytes" else bpe
    ids = np.array([*chosen.encode(TEXT, add_special_tokens=False), chosen.eos_token_id])
    counter = ByteCounter(chosen)
    assert counter.count(ids) == len(TEXT.encode())
    ends = [1, 5, 6, 7, 30, len(ids) - 1, len(ids)]
    between = counter.count_between(ids, ends)
    assert len(between) == len(ends) - 1
    assert sum(between) == len(TEXT.encode()) - counter.count(ids[:1])
    assert between[-1] == 0, "the end of a document has no bytes"


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    (document,) = load_documents(tmp_path / "book.txt", tokenizer)
    assert (document.name, document.index) == ("book.txt", 0)
    assert tokenizer.decode(document.tokens.tolist()) == TEXT
    (document,) = load_documents(tmp_path / "book.txt", tokenizer, longest=10)
    assert len(document.tokens) == 10


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A test split of documents of 1, 30, 5 and 80 tokens in two shards."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    writer = ShardWriter(folder, "test", "uint16", shard_tokens=40)
    shards = [writer.add(f"d{n}", np.arange(3, 3 + n), n) for n in (1, 30, 5, 80)]
    described = [shard for shard in [*shards, writer.close()] if shard is not None]
    write_manifest(folder, "uint16", describe_tokenizer(tokenizer, "bytes"), {"test": described}, [])
    return folder


def test_documents_of_a_corpus(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = load_documents(corpus, tokenizer)
    assert [(d.name, d.index, len(d.tokens)) for d in documents] == [
        ("d30", 1, 30),
        ("d5", 2, 5),
        ("d80", 3, 80),
    ]
    for document in documents:
        assert np.array_equal(document.tokens, np.arange(3, 3 + len(document.tokens)))
    chosen = load_documents(corpus, tokenizer, shortest=10, longest=50)
    assert [(d.index, len(d.tokens)) for d in chosen] == [(1, 30), (3, 50)]
    assert [d.index for d in load_documents(corpus, tokenizer, count=2)] == [1, 2]


def test_what_cannot_be_read_is_named(
    tmp_path: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase, bpe: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "short.txt").write_text("a")
    for path, message in (
        (tmp_path / "none.txt", "none.txt: no such file"),
        (tmp_path, r"is no corpus: it has no manifest\.json"),
        (tmp_path / "short.txt", "expected documents of at least 2 tokens, got none"),
    ):
        with pytest.raises(DRTError, match=message):
            load_documents(path, tokenizer)
    with pytest.raises(DRTError, match="has no split 'validation'; it has test"):
        load_documents(corpus, tokenizer, split="validation")
    with pytest.raises(DRTError, match="made with another tokenizer"):
        load_documents(corpus, bpe)
    with pytest.raises(DRTError, match="at least 81 tokens, got none"):
        load_documents(corpus, tokenizer, shortest=81)
