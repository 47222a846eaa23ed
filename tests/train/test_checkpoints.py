"""A checkpoint counts only when it is whole."""

from __future__ import annotations

from pathlib import Path

from drt.train.checkpoints import (
    checkpoint_folder,
    delete_others,
    find_checkpoints,
    is_complete,
    mark_complete,
)


def _write(output_dir: Path, step: int, whole: bool = True) -> Path:
    folder = checkpoint_folder(output_dir, step)
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    if whole:
        mark_complete(folder)
    return folder


def test_whole_and_incomplete_are_told_apart_and_sorted_by_step(tmp_path: Path) -> None:
    ten, nine, eight = _write(tmp_path, 10), _write(tmp_path, 9), _write(tmp_path, 8, whole=False)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert find_checkpoints(tmp_path) == ([nine, ten], [eight])
    assert is_complete(nine)
    assert not is_complete(eight)


def test_deleting_keeps_the_named_and_the_incomplete(tmp_path: Path) -> None:
    folders = [_write(tmp_path, step) for step in (1, 2, 3, 4)]
    incomplete = _write(tmp_path, 5, whole=False)
    delete_others(tmp_path, [folders[1], folders[3]])
    assert find_checkpoints(tmp_path) == ([folders[1], folders[3]], [incomplete])
    assert not folders[0].exists()
