"""Writing and reading files: regular ones only, whole or not at all."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import pickle
import time
from pathlib import Path

import pytest

from drt.errors import DRTError
from drt.files import (
    atomic_write,
    check_output,
    fill_folder,
    is_locked,
    lock_file,
    new_folder,
    open_regular,
    read_json,
    write_text,
)


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    path.chmod(0o640)
    write_text(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "target", tmp_path / "out"
    target.write_text("kept")
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/full")
    for refused in (lambda: write_text(path, "x"), lambda: check_output(path)):
        with pytest.raises(DRTError, match=path.name):
            refused()
    with pytest.raises(DRTError, match=path.name):
        open_regular(path, os.O_WRONLY | os.O_TRUNC if kind != "folder" else os.O_RDONLY)
    assert target.read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="none/out"):
        write_text(tmp_path / "none" / "out", "x")


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "lock", "busy here")
    with pytest.raises(DRTError, match="busy here"):
        lock_file(tmp_path / "lock", "busy here")
    assert is_locked(tmp_path / "lock")
    first.close()
    first.close()
    assert not is_locked(tmp_path / "lock")
    with lock_file(tmp_path / "lock", "busy here"):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_forked_child_neither_keeps_a_lock_nor_gives_it_back(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock", "busy here")
    wake, asleep = os.pipe()
    child = os.fork()
    if child == 0:
        lock.close()
        os.close(asleep)
        os.read(wake, 1)  # until the parent closes its end
        os._exit(0)
    os.close(wake)
    time.sleep(0.05)
    with pytest.raises(DRTError, match="busy here"):
        lock_file(tmp_path / "lock", "busy here")
    os.close(lock._descriptor)  # as a parent does that is killed
    lock._descriptor = -1
    lock_file(tmp_path / "lock", "busy here").close()
    os.close(asleep)
    assert os.waitpid(child, 0)[1] == 0
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to the process"):
            copied(lock)


def test_a_lock_file_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it; two processes would each have a lock of their own."""
    path, flock = tmp_path / "lock", fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with lock_file(path, "busy here"), pytest.raises(DRTError, match="busy here"):
        lock_file(path, "busy here")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DRTError, match="does not support locks"):
        lock_file(tmp_path / "lock", "busy here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff\xfe", b'"' + b"x" * 200 + b'"'])
def test_hostile_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(DRTError, match=r"some\.json"):
        read_json(path, max_bytes=150_000 if content.startswith(b"[") else 100)


def test_a_folder_is_filled_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "other").write_text("kept")
    (folder / "a").write_text("old")
    with fill_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "below").mkdir()
        (temporary / "below" / "b").write_text("new")
        assert (folder / "a").read_text() == "old"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a": "new", "below/b": "new", "other": "kept"}
    assert {path.name for path in folder.iterdir()} == {"a", "below", "other"}


def test_a_folder_that_cannot_be_filled_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")

    def fill(mistake: Exception | None) -> None:
        with fill_folder(tmp_path) as temporary:
            (temporary / "a").write_text("new")
            (temporary / "b").write_text("new")
            if mistake is not None:
                raise mistake

    with pytest.raises(DRTError, match="b: expected a regular file"):
        fill(None)
    with pytest.raises(KeyError):
        fill(KeyError())
    assert {path.name for path in tmp_path.iterdir()} == {"b", "file"}
    with pytest.raises(DRTError, match="file: expected a folder"), fill_folder(tmp_path / "file"):
        pytest.fail("a file is no folder")


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    with new_folder(folder) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "deep" / "file").read_text() == "x"
    (tmp_path / "other").mkdir()
    assert folder.stat().st_mode == (tmp_path / "other").stat().st_mode

    def fail(path: Path) -> None:
        with new_folder(path) as temporary:
            (temporary / "file").write_text("half")
            if path != folder:
                raise KeyError

    with pytest.raises(KeyError):
        fail(tmp_path / "another")
    with pytest.raises(DRTError, match="expected nothing there, got a folder"):
        fail(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "other"]
    assert [path.name for path in folder.iterdir()] == ["deep"]


def test_a_new_folder_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("drt.files._sync", lambda path, flags=0: synced.append(path.name))
    monkeypatch.setattr("os.rename", lambda *_: synced.append("renamed"))
    with new_folder(tmp_path / "final") as temporary:
        (temporary / "file").write_text("x")
    assert synced == ["file", temporary.name, "renamed", tmp_path.name]
