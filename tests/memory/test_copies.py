"""Open archives that are copied, pickled, used after a fork, or used when they are closed."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import CHUNKS, offer, tree, write

from drt.memory import Archive, ArchiveWriter, ChunkStore, verify_archive

SEGMENTS = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "archive", SEGMENTS)
    return tmp_path / "archive"


def assert_holds(store: ChunkStore, *segments: int) -> None:
    """The chunks of these segments, in this order."""
    indices = torch.arange(len(segments) * CHUNKS).view(1, 1, -1)
    assert store.counts.tolist() == [indices.shape[2]]
    read = store.gather(indices)
    keys, values, landmarks, lengths = (
        torch.cat(parts, 1) for parts in zip(*[offer(n)[:4] for n in segments], strict=True)
    )
    assert torch.equal(read.keys[:, 0], keys.bfloat16())
    assert torch.equal(read.values[:, 0], values.bfloat16())
    assert torch.equal(read.lengths[:, 0], lengths)
    assert torch.equal(torch.cat(list(store.landmark_blocks()), 1), landmarks)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_reader_outlives_it(path: Path, copied: Callable[[Archive], Archive]) -> None:
    with Archive.open(path) as archive:
        other = copied(archive)
    # A shallow copy shares the files; those of a deep copy are its own.
    if copied is copy.copy:
        with pytest.raises(ValueError, match="is closed"):
            other.store().gather(torch.zeros(1, 1, 1, dtype=torch.long))
    else:
        assert_holds(other.store(), *range(SEGMENTS))
        assert other.source(0).text == b"000"


def test_copies_of_a_store_grow_apart(path: Path) -> None:
    with Archive.open(path) as archive:
        store = archive.store()
        store.append(*offer(50))
        copies = [copy.deepcopy(store) for _ in range(2)]
    del store
    for number, one in enumerate(copies):
        one.append(*offer(60 + number))
    for number, one in enumerate(copies):
        assert_holds(one, *range(SEGMENTS), 50, 60 + number)


@pytest.mark.parametrize("of", [lambda archive: archive, lambda archive: archive.store()])
def test_what_cannot_be_copied_or_pickled(path: Path, of: Callable[[Archive], Any]) -> None:
    with Archive.open(path) as archive, pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(of(archive))
    with ArchiveWriter.open(path) as writer:
        for forbidden in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"open for writing|cannot be pickled"):
                forbidden(of(writer))
        with pytest.raises(TypeError, match="open for writing"):
            copy.copy(writer)


def test_a_closed_archive_reads_no_other_file(path: Path, tmp_path: Path) -> None:
    """Its descriptors are numbers, which files that are opened later take."""
    with Archive.open(path) as archive:
        store, document = archive.store(), archive.documents[0]
    files = [(path / "chunks.bin").open("rb") for _ in range(8)]
    for use in (
        lambda: store.gather(torch.zeros(1, 1, 1, dtype=torch.long)),
        lambda: list(store.landmark_blocks()),
        lambda: archive.source(0),
        lambda: archive.text(document, 0, 3),
    ):
        with pytest.raises(ValueError, match="is closed"):
            use()
    for file in files:
        file.close()


def in_child(action: Callable[[], None]) -> str:
    """The name of what an action raises in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        raised = "nothing"
        try:
            action()
        except (AssertionError, TypeError, ValueError) as error:
            raised = type(error).__name__
        finally:
            os.write(writing, raised.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_forked_process_reads_what_its_parent_reads(path: Path) -> None:
    with Archive.open(path) as archive:
        store = archive.store()
        assert in_child(lambda: assert_holds(store, *range(SEGMENTS))) == "nothing"
        assert_holds(store, *range(SEGMENTS))


def test_a_forked_process_does_not_write_for_its_parent(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "expected", SEGMENTS + 2)
    before = tree(path)
    with ArchiveWriter.open(path) as writer:
        store = writer.store()
        for forbidden in (
            lambda: (writer.begin_document("theirs"), store.append(*offer(9))),
            lambda: writer.commit({}, finished=True),
            writer.index,
            lambda: list(store.landmark_blocks()),
        ):
            assert in_child(forbidden) == "TypeError"
        assert tree(path) == before
    write(path, SEGMENTS + 2)
    assert verify_archive(path) == []
    assert tree(path) == tree(tmp_path / "expected")
