"""Shards on disk: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drt.data.corpus import Corpus, open_corpus, read_manifest
from drt.data.corpus_writer import ShardWriter, token_dtype, write_manifest
from drt.errors import DRTError

LENGTHS = [5, 12, 1, 30, 7, 2]
MakeCorpus = Callable[..., Path]


def documents(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), length) for length in LENGTHS]


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """Writes `documents` as the training split, in shards of at least 16 tokens: 3 of them."""

    def make(dtype: str = "uint16", shard_tokens: int = 16) -> Path:
        folder = tmp_path / dtype
        folder.mkdir()
        writer = ShardWriter(folder, "train", dtype, shard_tokens=shard_tokens)
        shards = [
            writer.add(f"name\n{index}", tokens, 3 * len(tokens))
            for index, tokens in enumerate(documents(dtype))
        ]
        described = [shard for shard in [*shards, writer.close()] if shard is not None]
        tokenizer = {"name": "own", "fingerprint": "f" * 64, "vocab_size": 9, "document_end": 1}
        write_manifest(folder, dtype, tokenizer, {"train": described}, [{"path": "here"}])
        return folder

    return make


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("shard_tokens", [1, 16, 1000])
def test_documents_are_read_back(make_corpus: MakeCorpus, dtype: str, shard_tokens: int) -> None:
    folder = make_corpus(dtype, shard_tokens)
    corpus = open_corpus(folder, "train", fingerprint="f" * 64, verify=True)
    written = documents(dtype)
    assert len(corpus) == len(written)
    for index, tokens in enumerate(written):
        assert corpus.document(index).dtype == np.dtype(dtype)
        assert np.array_equal(corpus.document(index), tokens)
    stream = np.concatenate(written)
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            assert np.array_equal(corpus.tokens(start, stop), stream[start:stop])
    assert corpus.num_tokens == len(stream) == corpus.manifest.splits["train"]["tokens"]
    assert corpus.num_bytes == 3 * len(stream) == corpus.manifest.splits["train"]["bytes"]
    assert corpus.document_bytes.tolist() == [3 * length for length in LENGTHS]
    assert corpus.names == [f"name\n{index}" for index in range(len(LENGTHS))]
    assert corpus.document_end == 1
    assert corpus.manifest.sources == [{"path": "here"}]
    assert not list(folder.glob("*.tmp"))


def test_shards_are_closed_at_their_size(make_corpus: MakeCorpus) -> None:
    shards = read_manifest(make_corpus()).splits["train"]["shards"]
    assert [shard["tokens"] for shard in shards] == [17, 31, 9]
    assert [shard["name"] for shard in shards] == ["train-00000", "train-00001", "train-00002"]


def test_documents_outside_are_refused(make_corpus: MakeCorpus) -> None:
    corpus = open_corpus(make_corpus(), "train")
    for index in (-1, len(LENGTHS)):
        with pytest.raises(IndexError, match=r"expected 0\.\.5"):
            corpus.document(index)
    with pytest.raises(IndexError, match="expected 0 <= start <= stop <= 57"):
        corpus.tokens(0, 58)


def test_a_flipped_bit_is_found(make_corpus: MakeCorpus) -> None:
    folder = make_corpus()
    path = folder / "train-00001.tokens.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    open_corpus(folder, "train")  # sizes alone do not show it
    with pytest.raises(DRTError, match=r"train-00001\.tokens\.bin is damaged: expected SHA-256"):
        open_corpus(folder, "train", verify=True)


@pytest.mark.parametrize("suffix", ["tokens.bin", "documents.bin", "names.jsonl"])
def test_truncated_and_missing_files_are_named(make_corpus: MakeCorpus, suffix: str) -> None:
    folder = make_corpus()
    path = folder / f"train-00002.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DRTError, match=rf"{path.name} is damaged: expected {len(content)} bytes, got"):
        open_corpus(folder, "train")
    path.unlink()
    with pytest.raises(DRTError, match=rf"{path.name}: a file of the corpus cannot be read"):
        open_corpus(folder, "train")


def test_another_tokenizer_is_refused(make_corpus: MakeCorpus) -> None:
    with pytest.raises(DRTError, match=r"made with another tokenizer \(own\): expected fingerprint 0000"):
        open_corpus(make_corpus(), "train", fingerprint="0" * 64)


def test_folders_that_are_no_corpus_are_refused(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    with pytest.raises(DRTError, match=r"is no corpus: it has no manifest\.json"):
        open_corpus(tmp_path, "train")
    folder = make_corpus()
    with pytest.raises(DRTError, match="has no split 'test'; it has train"):
        open_corpus(folder, "test")
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for broken, message in (
        ("{", "expected a JSON file"),
        ("[" * 10**6, "nested too deeply"),
        ("[]", r"expected a corpus of format 1, got 'list'"),
        (json.dumps({**values, "format": 2}), "expected a corpus of format 1, got 2"),
        (json.dumps({**values, "splits": 3}), "damaged"),
        (json.dumps({**values, "dtype": "int8"}), "expected dtype uint16 or uint32, got 'int8'"),
    ):
        path.write_text(broken)
        with pytest.raises(DRTError, match=message):
            open_corpus(folder, "train")


def keys_below(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield value, key
        yield from keys_below(below)


def test_what_a_stranger_writes_into_a_manifest_is_refused_in_words(make_corpus: MakeCorpus) -> None:
    """Every value in turn is replaced by others: it is refused, or what is read of the corpus can be read."""
    folder = make_corpus()
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    refused = 0
    for container, key in list(keys_below(values)):
        whole = container[key]
        for forged in (None, -1, 2**62, "../x", [], {}, 1.5, True):
            container[key] = forged
            path.write_text(json.dumps(values))
            try:
                corpus = open_corpus(folder, "train", verify=True)
                assert len(corpus.names) == len(corpus)
                assert corpus.document_end is None or corpus.document_end >= 0
            except DRTError as error:
                refused += str(folder) in str(error)
        container[key] = whole
    assert refused > 100


def test_names_that_are_damaged_are_refused(make_corpus: MakeCorpus) -> None:
    folder = make_corpus()
    path = next(folder.glob("*.names.jsonl"))
    size = path.stat().st_size
    for content in (b"[" * size, b"\xff" * size, b'"x"\n' + b" " * (size - 4)):
        path.write_bytes(content)
        with pytest.raises(DRTError, match=rf"{path.name} is damaged"):
            _ = open_corpus(folder, "train").names


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "uint16")
    assert writer.add("name", np.arange(3), 3) is None
    assert list(tmp_path.iterdir())
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    assert writer.close() is None


def test_the_smallest_dtype_that_fits() -> None:
    assert [token_dtype(size) for size in (259, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]


def test_an_empty_split(make_corpus: MakeCorpus) -> None:
    manifest = read_manifest(make_corpus())
    manifest.splits["test"] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    corpus = Corpus(manifest, "test")
    assert (len(corpus), corpus.num_tokens, corpus.num_bytes, corpus.names) == (0, 0, 0, [])
    assert len(corpus.tokens(0, 0)) == 0


def test_a_pipe_in_place_of_a_file_is_not_waited_for(make_corpus: MakeCorpus) -> None:
    folder = make_corpus()
    names = folder / "train-00000.names.jsonl"
    names.unlink()
    os.mkfifo(names)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["files"][names.name]["size"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DRTError, match="expected a regular file, got a pipe"):
        open_corpus(folder, "train")
