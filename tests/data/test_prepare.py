"""Text to shards: splits, several processes, and going on after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drt.data import prepare
from drt.data.corpus import SPLITS, open_corpus
from drt.data.corpus_writer import ShardWriter
from drt.data.haystack import Haystack
from drt.data.prepare import PrepareConfig, prepare_corpus, split_of
from drt.data.sources import Source
from drt.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from drt.errors import DRTError


@pytest.fixture
def rows(tmp_path: Path, books: Haystack) -> Path:
    """Sixty documents of 1 to 2,000 bytes."""
    path = tmp_path / "rows.jsonl"
    sizes = np.random.default_rng(0).integers(1, 2000, 60)
    text = books.text.decode("ascii", "ignore")
    path.write_text(
        "".join(
            json.dumps({"id": f"document {number}", "text": text[number * 1000 :][:size].strip() or "x"})
            + "\n"
            for number, size in enumerate(sizes)
        )
    )
    return path


@pytest.fixture
def config(rows: Path) -> PrepareConfig:
    return PrepareConfig(
        sources=[Source(path=str(rows))], tokenizer="bytes", validation_share=0.2, test_share=0.3
    )


def texts_of(rows: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in map(json.loads, rows.read_text().splitlines())}


def test_a_corpus_holds_every_text_in_one_split(config: PrepareConfig, rows: Path, tmp_path: Path) -> None:
    seen = []
    manifest = prepare_corpus(config, tmp_path / "corpus", on_progress=seen.append, shard_tokens=8000)
    texts = texts_of(rows)
    found: dict[str, str] = {}
    for split in SPLITS:
        corpus = open_corpus(tmp_path / "corpus", split, verify=True)
        assert len(corpus) > 5
        for index, name in enumerate(corpus.names):
            ids = corpus.document(index)
            assert ids[-1] == corpus.document_end == 1
            text = (ids[:-1] - 3).astype(np.uint8).tobytes()
            assert corpus.document_bytes[index] == len(text)
            assert name not in found
            found[name] = text.decode()
            assert split == split_of(name, 0.2, 0.3)
    assert found == texts
    assert len(manifest.splits["train"]["shards"]) > 2
    assert seen[-1].documents == 60
    assert seen[-1].bytes == sum(map(len, texts.values()))
    assert (
        fingerprint(load_tokenizer(str(tmp_path / "corpus" / "tokenizer")))
        == manifest.tokenizer["fingerprint"]
    )
    assert not list((tmp_path / "corpus").glob("*.tmp"))
    assert not (tmp_path / "corpus" / "progress.json").exists()


def test_sources_with_a_split_and_short_documents(config: PrepareConfig, rows: Path, tmp_path: Path) -> None:
    config = replace(
        config,
        sources=[replace(config.sources[0], split=split) for split in SPLITS],
        min_tokens=500,
        min_test_tokens=1000,
    )
    prepare_corpus(config, tmp_path / "corpus")
    lengths = np.array([len(text) + 1 for text in texts_of(rows).values()])
    for split, least in zip(SPLITS, (500, 1000, 1000), strict=True):
        corpus = open_corpus(tmp_path / "corpus", split)
        assert corpus.document_lengths.tolist() == lengths[lengths >= least].tolist()


def test_a_share_to_train_on(config: PrepareConfig, tmp_path: Path) -> None:
    prepare_corpus(config, tmp_path / "whole")
    prepare_corpus(replace(config, train_share=0.2), tmp_path / "part")
    whole, part = (
        {split: open_corpus(tmp_path / name, split).names for split in SPLITS} for name in ("whole", "part")
    )
    assert whole["test"] == part["test"]
    assert whole["validation"] == part["validation"]
    assert 0 < len(part["train"]) < len(whole["train"])
    assert set(part["train"]) < set(whole["train"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_several_processes_make_the_same_corpus(
    config: PrepareConfig, tmp_path: Path, books: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(train_tokenizer([books.text.decode()], 400), tmp_path / "bpe")
    config = replace(config, tokenizer=str(tmp_path / "bpe"))
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 3000)
    prepare_corpus(config, tmp_path / "one", shard_tokens=3000)
    prepare_corpus(config, tmp_path / "two", processes=2, shard_tokens=3000)
    assert files(tmp_path / "one") == files(tmp_path / "two")


class Killed(BaseException):
    """Stands for SIGKILL."""


def _close_files(writer: prepare._CorpusWriter) -> None:
    """A kill tidies nothing up: what was written stays."""
    for shard in writer._writers.values():
        if shard._file is not None:
            shard._file.close()


@pytest.mark.parametrize("killed_after", [3, 20, 45])
def test_preparing_goes_on_after_a_kill(
    config: PrepareConfig, tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_corpus(config, tmp_path / "whole", shard_tokens=6000)
    encoded = []
    encode = prepare._Encoder.__call__

    def count(self, piece):
        encoded.extend([piece] if piece is not None else [])
        if len(encoded) == killed_after:
            raise Killed
        return encode(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(prepare._Encoder, "__call__", count)
        patch.setattr(prepare._CorpusWriter, "abandon", _close_files)
        with pytest.raises(Killed):
            prepare_corpus(config, tmp_path / "killed", shard_tokens=6000)
        with pytest.raises(DRTError, match="is no corpus"):
            open_corpus(tmp_path / "killed", "train")
        if killed_after > 10:
            with pytest.raises(DRTError, match="unfinished corpus of other settings"):
                prepare_corpus(replace(config, min_tokens=2), tmp_path / "killed")
        encoded.clear()
        encoded += [b""] * 100  # never 3, 20 or 45 again
        prepare_corpus(config, tmp_path / "killed", shard_tokens=6000)
    assert (len(encoded) - 100 < 60) == (killed_after > 10)  # what was finished was not done again
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_corpus_is_left_as_it_is(config: PrepareConfig, tmp_path: Path) -> None:
    first = prepare_corpus(config, tmp_path / "corpus")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    assert prepare_corpus(config, tmp_path / "corpus") == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    with pytest.raises(DRTError, match="holds a corpus of other settings"):
        prepare_corpus(replace(config, test_share=0.1), tmp_path / "corpus")


@pytest.mark.parametrize("change", ["reordered", "begun anew", "other text", "shorter"])
def test_sources_that_have_changed_are_noticed(
    config: PrepareConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    interrupt(config, tmp_path / "stopped", monkeypatch, after=40)
    prepare_corpus(config, tmp_path / "finished")
    lines = rows.read_text().splitlines(keepends=True)
    changed = {
        "reordered": [lines[1], lines[0], *lines[2:]],
        "begun anew": ['{"id": "new", "text": "a new document"}\n', *lines],
        "other text": [lines[0].replace('"text": "', '"text": "x'), *lines[1:]],
        "shorter": lines[:10],
    }
    rows.write_text("".join(changed[change]))
    for folder in ("stopped", "finished"):
        with pytest.raises(DRTError, match=f"{folder} holds .* the sources have changed"):
            prepare_corpus(config, tmp_path / folder)


def test_a_source_that_has_grown_at_its_end(
    config: PrepareConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not read yet may still come; a finished corpus is of other text."""
    interrupt(config, tmp_path / "stopped", monkeypatch, after=40)
    prepare_corpus(config, tmp_path / "finished")
    rows.write_text(rows.read_text() + '{"id": "new", "text": "a new document"}\n')
    prepare_corpus(config, tmp_path / "stopped", shard_tokens=6000)
    prepare_corpus(config, tmp_path / "whole", shard_tokens=6000)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    with pytest.raises(DRTError, match="the sources have changed"):
        prepare_corpus(config, tmp_path / "finished")


def interrupt(config: PrepareConfig, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Prepare until so many documents are written."""

    def stop(progress: prepare.Progress) -> None:
        if progress.documents == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, output, on_progress=stop, shard_tokens=6000)
    assert (output / "progress.json").exists()


def test_one_process_prepares_a_folder(config: PrepareConfig, tmp_path: Path) -> None:
    refused = []

    def prepare_too(progress: prepare.Progress) -> None:
        with pytest.raises(DRTError, match="another process is preparing") as error:
            prepare_corpus(config, tmp_path / "corpus")
        refused.append(error)

    prepare_corpus(config, tmp_path / "corpus", on_progress=prepare_too)
    assert len(refused) == 60
    assert not (tmp_path / "corpus" / "lock").exists()
    open_corpus(tmp_path / "corpus", "train", verify=True)


def test_a_call_that_fails_at_once_leaves_no_folder(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="no such file or folder"):
        prepare_corpus(replace(config, sources=[Source(path="none.txt")]), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_is_named_and_gone_on_from(
    config: PrepareConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DRTError, match=r"-00000\.tokens\.bin: .*No space left on device"):
            prepare_corpus(config, tmp_path / "corpus")
    prepare_corpus(config, tmp_path / "corpus")
    open_corpus(tmp_path / "corpus", "train", verify=True)


def test_files_and_folder_are_on_the_disk_before_progress_counts_them(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is renamed was synced, and the folder is synced before the next file relies on it."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def watch_sync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def watch_rename(old: Any, new: Any) -> None:
        assert ("sync", Path(old).name) in events
        events.append(("rename", Path(new).name))
        rename(old, new)

    monkeypatch.setattr("os.fsync", watch_sync)
    monkeypatch.setattr("os.replace", watch_rename)
    prepare_corpus(config, tmp_path / "corpus")
    renamed = [name for kind, name in events if kind == "rename"]
    for split in SPLITS:
        for suffix in ("tokens.bin", "documents.bin", "names.jsonl"):
            assert renamed.index(f"{split}-00000.{suffix}") < renamed.index("progress.json")
    for number, (kind, name) in enumerate(events):
        if (kind, name) == ("rename", "progress.json"):
            assert events[number - 2] == ("sync", "corpus")
            assert events[number + 1] == ("sync", "corpus")


def test_small_documents_take_a_time_that_is_linear(tmp_path: Path) -> None:
    """Forty thousand took fifty seconds, nearly all of them in adding up what had been written."""
    writer = ShardWriter(tmp_path, "train", "uint16")
    tokens = np.arange(5)
    began = time.process_time()
    for number in range(40_000):
        writer.add(f"{number}", tokens, 5)
    assert time.process_time() - began < 5
    shard = writer.close()
    assert shard is not None
    assert (shard["documents"], shard["tokens"]) == (40_000, 200_000)


def test_a_long_line_takes_little_more_memory_than_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drt.data.tokens._PIECE", 2**16)
    text = tmp_path / "line.txt"
    size = 2**24
    text.write_bytes(b"words in a line " * (size // 16))
    made = PrepareConfig(sources=[Source(path=str(text), split="train")], tokenizer="bytes")
    prepare_corpus(made, tmp_path / "first")  # imports and caches are not counted
    tracemalloc.start()
    try:
        prepare_corpus(made, tmp_path / "corpus")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size  # the text, its tokens as uint16, and what is passing through
    assert len(open_corpus(tmp_path / "corpus", "train").document(0)) == size + 1


def test_settings_that_do_not_fit_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="at least one source of text, got none"):
        replace(config, sources=[])
    with pytest.raises(DRTError, match=r"expected 0\.\.1 in all, got \(0\.6, 0\.6, 0\.0\)"):
        replace(config, validation_share=0.6, test_share=0.6)
    with pytest.raises(DRTError, match="expected one of train, validation, test, got 'dev'"):
        replace(config, sources=[Source(path="x", split="dev")])
    with pytest.raises(DRTError, match="hold no document of at least 5000 tokens"):
        prepare_corpus(replace(config, min_tokens=5000, min_test_tokens=5000), tmp_path / "corpus")


def die(pieces: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_of(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_encode_batch", die)
    with pytest.raises(DRTError, match="fewer --processes"):
        prepare_corpus(config, tmp_path / "corpus", processes=2)


def test_shares_that_are_no_numbers_are_refused(config: PrepareConfig) -> None:
    for name in ("validation_share", "test_share", "train_share"):
        with pytest.raises(DRTError, match="shares of validation, test and train"):
            replace(config, **{name: float("nan")})


def test_sources_without_a_document_leave_no_folder(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="hold no document"):
        prepare_corpus(replace(config, min_tokens=10**6, min_test_tokens=10**6), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
