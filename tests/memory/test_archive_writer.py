"""What a writer makes of its folder, of failed writes, and of what others have put among its files."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CHUNKS, DESCRIPTION, SIZE, offer, text, tree, write

from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, archive_folder, archive_verify, archive_writer, verify_archive
from drt.memory.manifest import DATA_FILES

NAMES = ("manifest.json", "segments.jsonl", "lock", "state-00000002.safetensors", *DATA_FILES)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of two segments."""
    path = tmp_path_factory.mktemp("two") / "archive"
    write(path, 2)
    return path


@pytest.fixture
def path(two: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(two, tmp_path / "archive")
    return tmp_path / "archive"


def write_segment(writer: ArchiveWriter, segment: int) -> None:
    """The first half of a document, committed but not finished."""
    writer.begin_document(f"document {segment // 2}")
    writer.store().append(*offer(segment))
    writer.add_text(text(segment), np.arange(1, CHUNKS + 1) * SIZE)
    writer.commit({"at": torch.tensor([segment])}, finished=False)


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tmp",
        "manifest.json.tmp",
        "state-7.safetensors",
        "state-00000007.safetensors",
        ".landmarks.faiss.abcd1234.tmp",
        "lock",
        "segments.jsonl",
        *DATA_FILES,
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_folder_that_holds_anything_is_refused_and_left_as_it_was(
    tmp_path: Path, name: str, kind: str
) -> None:
    folder, target = tmp_path / "folder", tmp_path / "target"
    folder.mkdir()
    target.write_text("precious")
    if kind == "file":
        (folder / name).write_text("precious")
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(target)
    with pytest.raises(DRTError, match="holds other files"):
        ArchiveWriter.create(folder, DESCRIPTION)
    assert [file.name for file in folder.iterdir()] == [name]
    assert kind == "folder" or (folder / name).read_text() == "precious"
    assert target.read_text() == "precious"


@pytest.mark.parametrize("lost", [("manifest.json",), ("manifest.json", "lock", "chunks.bin")])
def test_an_archive_without_its_manifest_is_not_overwritten(path: Path, lost: tuple[str, ...]) -> None:
    for name in lost:
        (path / name).unlink()
    before = tree(path)
    with pytest.raises(DRTError, match="holds other files"):
        ArchiveWriter.create(path, DESCRIPTION)
    assert tree(path) == before


def test_what_others_put_among_the_files_stays(two: Path, path: Path) -> None:
    (path / ".sync.tmp").mkdir()
    (path / "state-00000009.safetensors").mkdir()
    (path / "state-00000008.safetensors").symlink_to(two / "lock")
    kept = ("thesis.tmp", "state-7.safetensors", "manifest.json.tmp", "chunks.bin.tmp")
    for name in kept:
        (path / name).write_text("precious")
    write(path, 4)
    assert all((path / name).read_text() == "precious" for name in kept)
    assert (path / ".sync.tmp").is_dir()
    assert (path / "state-00000009.safetensors").is_dir()
    assert (path / "state-00000008.safetensors").is_symlink()
    assert verify_archive(path) == []


def test_what_a_killed_writer_leaves_is_removed(path: Path) -> None:
    for name in (".manifest.json.abcd1234.tmp", ".state-00000003.safetensors.abcd_234.tmp"):
        (path / name).write_text("half")
    (path / "state-00000003.safetensors").write_text("not committed")
    ArchiveWriter.open(path).close()
    assert sorted(tree(path)) == sorted(NAMES)


def test_what_a_killed_creation_leaves_is_gone_on_with(tmp_path: Path) -> None:
    for name in ("lock", "segments.jsonl", "chunks.bin"):
        (tmp_path / name).touch()
    (tmp_path / ".manifest.json.abcd1234.tmp").write_text('{"form')
    write(tmp_path, 2)
    assert sorted(tree(tmp_path)) == sorted(NAMES)


def test_an_archive_without_commits_is_made_anew(tmp_path: Path) -> None:
    ArchiveWriter.create(tmp_path / "archive", DESCRIPTION).close()
    (tmp_path / "archive" / "chunks.bin").write_bytes(b"not committed")
    with ArchiveWriter.create(tmp_path / "archive", DESCRIPTION) as writer:
        write_segment(writer, 0)
    with pytest.raises(DRTError, match="is an archive already"):
        ArchiveWriter.create(tmp_path / "archive", DESCRIPTION)


@pytest.mark.parametrize("made", [True, False])
def test_a_failed_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    folder = tmp_path / "some" / "archive"
    if made:
        folder.mkdir(parents=True)

    def fail(*arguments: object) -> None:
        raise DRTError("disk full")

    for where, name in ((archive_folder, "lock_archive"), (archive_writer, "atomic_write")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            with pytest.raises(DRTError, match="disk full"):
                ArchiveWriter.create(folder, DESCRIPTION)
        assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if made else [])
    write(folder, 2)


def test_what_fails_before_its_first_commit_leaves_nothing_and_later_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "some" / "archive"
    fail_after(lambda: ArchiveWriter.create(path, DESCRIPTION), lambda writer: writer.begin_document("one"))
    assert list(tmp_path.iterdir()) == []
    fail_after(lambda: ArchiveWriter.create(path, DESCRIPTION), lambda writer: write_segment(writer, 0))
    fail_after(lambda: ArchiveWriter.open(path), lambda writer: None)
    with ArchiveWriter.open(path) as writer:
        assert writer.num_segments == 1


def fail_after(begin: Callable[[], ArchiveWriter], work: Callable[[ArchiveWriter], object]) -> None:
    def run() -> None:
        with begin() as writer:
            work(writer)
            raise KeyError

    with pytest.raises(KeyError):
        run()


def failing(number: int, call: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The function, which raises at its call of that number."""
    calls = iter(range(number))

    def fail(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return call(*arguments)

    return fail


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "number", "error"),
    [("pwrite", number, FULL) for number in range(5)]
    + [("fdatasync", number, FULL) for number in (0, 3, 4)]
    + [("replace", 0, FULL), ("replace", 1, FULL), ("fsync", 0, FULL), ("fsync", 3, FULL)]
    + [("pwrite", 1, KeyboardInterrupt()), ("fsync", 1, KeyboardInterrupt())],
)
def test_a_writer_that_has_failed_once_writes_no_more(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: BaseException
) -> None:
    with ArchiveWriter.open(path) as writer:
        store = writer.store()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(number, getattr(os, name), error))
            with pytest.raises((DRTError, KeyboardInterrupt)):
                write_segment(writer, 2)
        before = tree(path)
        refused: list[Callable[[], object]] = [
            lambda: writer.commit({}, finished=True),
            lambda: store.append(*offer(2)),
            lambda: writer.index(),
        ]
        for call in refused:
            with pytest.raises(DRTError, match="an earlier write has failed; open the archive again"):
                call()
        assert tree(path) == before
    write(path, 4)
    assert verify_archive(path) == []
    write(tmp_path / "whole", 4)
    assert tree(path) == tree(tmp_path / "whole")


def test_a_closed_writer_writes_no_more(path: Path) -> None:
    writer = ArchiveWriter.open(path)
    store = writer.store()
    writer.begin_document("one")
    writer.close()
    with pytest.raises(DRTError, match="this writer is closed"):
        store.append(*offer(2))


def test_a_writer_belongs_to_its_process(path: Path) -> None:
    with ArchiveWriter.open(path) as writer:
        store = writer.store()
        writer.begin_document("one")
        child = os.fork()
        if child == 0:
            try:
                store.append(*offer(2))
            except TypeError:
                writer.__exit__(KeyError, KeyError(), None)
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with pytest.raises(
            DRTError, match="another process is writing"
        ):  # the child has not given the lock back
            ArchiveWriter.open(path)
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                copied(writer)
        store.append(*offer(2))
    assert verify_archive(path) == []


def kinds(path: Path, target: Path) -> Iterator[None]:
    """What may lie where a regular file is expected."""
    path.symlink_to(target)
    yield
    path.unlink()
    path.symlink_to("/dev/zero")
    yield
    path.unlink()
    os.mkfifo(path)
    yield
    path.unlink()
    path.mkdir()
    yield


@pytest.mark.parametrize("name", NAMES)
def test_only_regular_files_are_read_or_written(path: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    (path / name).rename(target)
    before = target.read_bytes()
    for _ in kinds(path / name, target):
        with pytest.raises(DRTError, match=name):
            write(path, 4)
        if name != "lock":
            assert any(name in problem for problem in verify_archive(path))
            with pytest.raises(DRTError, match=name):
                Archive.open(path)
    assert target.read_bytes() == before


def test_a_missing_file_is_not_made_by_opening(path: Path) -> None:
    (path / "chunks.bin").unlink()
    with pytest.raises(DRTError, match=r"chunks\.bin"):
        ArchiveWriter.open(path)
    assert not (path / "chunks.bin").exists()


def test_rollback_returns_to_the_last_finished_state(two: Path, path: Path) -> None:
    with ArchiveWriter.open(path) as writer:
        write_segment(writer, 2)
    with ArchiveWriter.rollback(path) as writer:
        assert (writer.num_segments, writer.finished) == (2, True)
        assert writer.unfinished_documents == []
    assert tree(path) == tree(two)
    with ArchiveWriter.rollback(path) as writer:  # nothing to drop
        assert writer.num_segments == 2
    assert tree(path) == tree(two)
    write(path, 4)
    assert verify_archive(path) == []


def test_rollback_drops_what_is_damaged_since(two: Path, path: Path) -> None:
    with ArchiveWriter.open(path) as writer:
        write_segment(writer, 2)
    journal = path / "segments.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    with pytest.raises(DRTError, match="truncated"):
        ArchiveWriter.open(path)
    ArchiveWriter.rollback(path).close()
    assert tree(path) == tree(two)


def test_rollback_of_a_first_build_leaves_room_for_another(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with ArchiveWriter.create(path, DESCRIPTION) as writer:
        write_segment(writer, 0)
    with ArchiveWriter.rollback(path) as writer:
        assert (writer.num_chunks, writer.documents, writer.state()) == (0, [], {})
    with ArchiveWriter.create(path, DESCRIPTION) as writer:
        write_segment(writer, 0)


def test_verify_beside_a_writer_tells_of_damage_alone(path: Path) -> None:
    with ArchiveWriter.open(path) as writer:
        write_segment(writer, 2)
        assert verify_archive(path) == []
        (path / "text.bin").write_bytes(b"?" + (path / "text.bin").read_bytes()[1:])
        assert verify_archive(path) == [f"{path / 'text.bin'} is damaged: segment 0 is not what was written"]
    assert any("is not finished" in problem for problem in verify_archive(path))


def test_verify_beside_a_first_build(tmp_path: Path) -> None:
    with ArchiveWriter.create(tmp_path / "archive", DESCRIPTION) as writer:
        write_segment(writer, 0)
        assert [problem.split(": ")[1] for problem in verify_archive(writer.path)] == [
            "another process is building it"
        ]


@pytest.mark.parametrize("name", ["read_state", "read_journal", "_damaged"])
@pytest.mark.parametrize("change", ["commit", "roll back and commit"])
def test_verify_sees_a_writer_at_work(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    """What it was to read next is replaced, or gone."""
    with ArchiveWriter.open(path) as writer:
        write_segment(writer, 2)
    call = getattr(archive_verify, name)

    def change_first(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(archive_verify, name, call)
        rolls_back = change != "commit"
        with ArchiveWriter.rollback(path) if rolls_back else ArchiveWriter.open(path) as writer:
            if rolls_back:
                writer.begin_document("another")
            writer.store().append(*offer(5))
            writer.commit({"at": torch.tensor([5])}, finished=True)
        return call(*arguments, **options)

    monkeypatch.setattr(archive_verify, name, change_first)
    assert verify_archive(path) == []
