"""A checkpoint counts only when it is whole, to the byte."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drt.train.checkpoints import (
    checkpoint_folder,
    delete_others,
    find_checkpoints,
    find_fault,
    is_complete,
    mark_complete,
)

FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    "training_args.bin",
]


def _write(output_dir: Path, step: int, whole: bool = True) -> Path:
    folder = checkpoint_folder(output_dir, step)
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(random.Random(f"{step} {name}").randbytes(1000))
    if whole:
        mark_complete(folder)
    return folder


def test_whole_and_incomplete_are_told_apart_and_sorted_by_step(tmp_path: Path) -> None:
    ten, nine, eight = _write(tmp_path, 10), _write(tmp_path, 9), _write(tmp_path, 8, whole=False)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-011").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert find_checkpoints(tmp_path) == ([nine, ten], [eight])
    assert is_complete(nine)
    assert not is_complete(eight)
    assert find_fault(nine) is None
    assert find_fault(eight) == "is incomplete (a save was cut short)"


def test_deleting_keeps_the_named_and_the_incomplete(tmp_path: Path) -> None:
    folders = [_write(tmp_path, step) for step in (1, 2, 3, 4)]
    incomplete = _write(tmp_path, 5, whole=False)
    delete_others(tmp_path, [folders[1], folders[3]])
    assert find_checkpoints(tmp_path) == ([folders[1], folders[3]], [incomplete])
    assert not folders[0].exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def _swap(path: Path, other: Path) -> None:
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


FAULTS: dict[str, Callable[[Path, Path], object]] = {
    "a flipped bit": lambda path, _: _flip(path),
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
    "cut to nothing": lambda path, _: path.write_bytes(b""),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path, _: path.write_bytes(b"\0" * path.stat().st_size),
    "missing": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "a link": lambda path, older: (path.unlink(), path.symlink_to(older / path.name)),
    "of an older one": lambda path, older: _swap(path, older / path.name),
    "of another file": lambda path, _: _swap(path, path.with_name("optimizer.pt")),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_no_fault_of_a_file_goes_unseen(tmp_path: Path, fault: str) -> None:
    _write(tmp_path, 8), _write(tmp_path, 10)
    for name in [*FILES, "complete.json"]:
        if (fault, name) == ("of another file", "optimizer.pt"):
            continue
        copy = Path(shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy"))
        newest, older = checkpoint_folder(copy, 10), checkpoint_folder(copy, 8)
        FAULTS[fault](newest / name, older)
        found = find_fault(newest)
        assert found is not None, f"{fault}: {name}"
        assert name == "complete.json" or name in found or "optimizer.pt" in found
        if fault != "of an older one":
            assert find_fault(older) is None
        shutil.rmtree(copy)


def test_whole_folders_that_changed_places(tmp_path: Path) -> None:
    eight, ten = _write(tmp_path, 8), _write(tmp_path, 10)
    ten.rename(tmp_path / "kept")
    eight.rename(ten)
    (tmp_path / "kept").rename(eight)
    assert find_fault(ten) == "is the checkpoint of step 8"
    assert find_fault(eight) == "is the checkpoint of step 10"


@pytest.mark.parametrize("content", ["[]", "7", '{"step": 10}', '{"step": 10, "files": 3}', "[" * 100_000])
def test_a_list_that_is_none(tmp_path: Path, content: str) -> None:
    folder = _write(tmp_path, 10)
    (folder / "complete.json").write_text(content)
    assert str(find_fault(folder)).startswith("is damaged (complete.json")


def test_a_checkpoint_of_an_earlier_version_is_still_one(tmp_path: Path) -> None:
    folder = _write(tmp_path, 10, whole=False)
    (folder / "complete").touch()
    assert find_checkpoints(tmp_path) == ([folder], [])
    assert find_fault(folder) is None
    delete_others(tmp_path, [])
    assert not folder.exists()


def test_the_list_names_files_sizes_and_digests(tmp_path: Path) -> None:
    listed = json.loads((_write(tmp_path, 10) / "complete.json").read_text())
    assert listed["step"] == 10
    assert sorted(listed["files"]) == sorted(FILES)
    assert {(entry["size"], len(entry["sha256"])) for entry in listed["files"].values()} == {(1000, 64)}
