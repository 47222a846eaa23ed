"""Which checkpoint folders of a run are whole.

The Trainer writes a checkpoint as many files in `checkpoint-N`. A marker file, written last, says that all
of them are on the disk; it is removed first when a checkpoint is deleted. So a kill at any moment leaves
every folder either whole and marked or unmarked, and the previous checkpoint is deleted only after the next
one is marked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from drt.errors import DRTError

MARKER = "complete"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint was written."""
    return (folder / MARKER).is_file()


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint's files to the disk, then mark the folder as whole."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush(path)
    _flush(folder)
    marker = folder / MARKER
    marker.touch()
    _flush(marker)
    _flush(folder)


def find_checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """Checkpoint folders of a run: (whole, incomplete), each by ascending step."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdigit():
            steps[int(number)] = folder
    folders = [steps[step] for step in sorted(steps)]
    whole = [folder for folder in folders if is_complete(folder)]
    return whole, [folder for folder in folders if not is_complete(folder)]


def delete_others(output_dir: Path, keep: Iterable[Path]) -> None:
    """Delete the whole checkpoints that are not in `keep`."""
    kept = set(keep)
    for folder in find_checkpoints(output_dir)[0]:
        if folder not in kept:
            (folder / MARKER).unlink()
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
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(folder.parent).free  # not every library says that the disk is full
        shutil.rmtree(folder, ignore_errors=True)
        whole, _ = find_checkpoints(folder.parent)
        kept = f"{whole[-1]} is whole, and the run goes on from there" if whole else "there is no earlier one"
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
