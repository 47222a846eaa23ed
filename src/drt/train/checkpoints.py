"""Which checkpoint folders of a run are whole.

The Trainer writes a checkpoint as many files in `checkpoint-N`. A list of them with their sizes and digests, written
last, says that all of them are on the disk; it is removed first when a checkpoint is deleted. So a kill at any moment
leaves every folder either whole and listed or unlisted, and an earlier checkpoint is deleted only after the next one is
listed. What does not agree with its list is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from drt.errors import DRTError
from drt.files import describe_kind, open_regular, read_json, sync_folder, sync_tree, write_text

LIST_FILE = "complete.json"
_UNLISTED_MARKER = "complete"  # an empty file: all that earlier versions wrote


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint was written; `find_fault` says whether they still are what was written."""
    return any((folder / name).is_file() for name in (LIST_FILE, _UNLISTED_MARKER))


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to the disk, then list them."""
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_text(folder / LIST_FILE, json.dumps({"step": _step(folder), "files": files}, indent=1))
    sync_folder(folder.parent)


def find_fault(folder: Path) -> str | None:
    """What keeps a checkpoint from being resumed, in words; None where every byte is what was written.

    Of a checkpoint of an earlier version, which has no list of its files, nothing can be said.
    """
    if folder.is_symlink():
        return "is a symbolic link"
    if not is_complete(folder):
        return "is incomplete (a save was cut short)"
    if not (folder / LIST_FILE).is_file():
        return None
    try:
        listed = read_json(folder / LIST_FILE)
        if listed["step"] != _step(folder):
            return f"is the checkpoint of step {listed['step']}"
        for name, known in listed["files"].items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"is damaged ({name} is missing)"
            if path.stat().st_size != known["size"] or _digest(path) != known["sha256"]:
                return f"is damaged ({name} is not what was written)"
    except (DRTError, OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"is damaged ({LIST_FILE}: {error})"
    return None


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _digest(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, by ascending step."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal() and number == str(int(number)):
            steps[int(number)] = folder
    return [steps[step] for step in sorted(steps)]


def find_checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """Checkpoint folders of a run: (complete, incomplete), each by ascending step."""
    folders = list_checkpoints(output_dir)
    complete = [folder for folder in folders if is_complete(folder)]
    return complete, [folder for folder in folders if not is_complete(folder)]


def delete_others(output_dir: Path, keep: Iterable[Path]) -> None:
    """Delete the complete checkpoints that are not in `keep`."""
    kept = set(keep)
    for folder in find_checkpoints(output_dir)[0]:
        if folder not in kept and not folder.is_symlink():
            delete(folder)


def delete(folder: Path) -> None:
    """Delete what there is of a checkpoint, so that a kill leaves no part of it that looks whole.

    Raises:
        DRTError: a link or a file is there instead of a folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DRTError(f"{folder}: expected a folder or nothing there, got {describe_kind(folder)}")
    for name in (LIST_FILE, _UNLISTED_MARKER):
        (folder / name).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """While a checkpoint is written: what goes wrong is told, and what there is of the checkpoint deleted.

    Raises:
        DRTError: it cannot be written. It says which checkpoint is the newest whole one.
    """
    try:
        yield
    # The libraries that write weights and optimizer say in their own ways that the disk is full.
    except (OSError, SafetensorError, RuntimeError, DRTError) as error:
        free = shutil.disk_usage(folder.parent).free  # not every library says that the disk is full
        shutil.rmtree(folder, ignore_errors=True)
        whole, _ = find_checkpoints(folder.parent)
        kept = f"{whole[-1]} is whole, and the run resumes from there" if whole else "there is no earlier one"
        raise DRTError(
            f"{folder} could not be written, {_reason(error)} ({free / 1e6:,.1f} MB were free on the disk); {kept}: "
            "make room and run the same command again"
        ) from error


def _reason(error: BaseException) -> str:
    """The cause in one line; what was raised first says more than what the libraries made of it."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
