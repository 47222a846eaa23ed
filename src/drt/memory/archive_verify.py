"""Is an archive whole? Everything in it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drt.errors import DRTError
from drt.files import is_locked
from drt.memory.approximate_index import INDEX_FILE, check_whole, indexed_point
from drt.memory.archive import JOURNAL, MANIFEST, check_index, read_journal, read_state
from drt.memory.archive_files import ArchiveFiles
from drt.memory.archive_folder import LOCK
from drt.memory.manifest import DATA_FILES, Manifest

_ATTEMPTS = 3


def verify_archive(path: Path | str, on_progress: Callable[[int], None] | None = None) -> list[str]:
    """Read everything in an archive and say what is wrong with it.

    Beside a process that writes to it, what was committed when the reading began is read.

    Args:
        path: folder of the archive.
        on_progress: called with the number of bytes just read of the data files.

    Returns:
        A line a problem, with the file's name; none: it is whole, and its last build or append is finished or at work.
    """
    folder = Path(path)
    try:
        for _ in range(_ATTEMPTS):
            manifest = Manifest.load(folder / MANIFEST)
            problems = _problems(folder, manifest, on_progress)
            if not problems or Manifest.load(folder / MANIFEST) == manifest:
                break  # else what was missing may have been replaced or dropped by a writer meanwhile
        return problems + _unfinished(folder)
    except DRTError as error:
        return [str(error)]


def _problems(folder: Path, manifest: Manifest, on_progress: Callable[[int], None] | None) -> list[str]:
    """What is wrong with anything that a manifest names; the states first, which a writer replaces."""
    problems = _states(folder, manifest)
    try:
        segments = read_journal(folder / JOURNAL, manifest.head, verify=True)
        files = ArchiveFiles(folder, manifest.description, writable=False, verify=True)
    except DRTError as error:
        return [*problems, str(error)]
    for segment in segments:
        files.add(segment)
    try:
        problems += files.wrong_sizes(manifest.head.chunks, manifest.head.text_bytes)
        for number in range(len(segments)):
            if files.too_large(segments[number]):
                continue
            problems += _damaged(files, number, on_progress)
    finally:
        files.close()
    return problems + _index(folder, manifest.description.landmark_size, on_progress)


def _unfinished(folder: Path) -> list[str]:
    """Whether a build or append has stopped before its end."""
    is_written = is_locked(folder / LOCK)  # before the manifest is read: its last commit is then seen
    manifest = Manifest.load(folder / MANIFEST)
    if manifest.head == manifest.finished:
        return []
    if not is_written:
        return [
            f"{folder} is not finished: {manifest.head.tokens:,} tokens are committed; run the same command again "
            f"to resume, or drop them: drt memory rollback {folder}"
        ]
    if manifest.finished is None:
        return [f"{folder} is not finished: another process is building it"]
    return []


def _damaged(files: ArchiveFiles, number: int, on_progress: Callable[[int], None] | None) -> list[str]:
    """What is wrong with one segment, a line a file."""
    problems = []
    for file in range(len(DATA_FILES)):
        try:
            files.check(number, file)
        except DRTError as error:
            problems.append(str(error))
        extent = files.extent(number, file)
        if on_progress is not None:
            on_progress((extent.last - extent.first) * files.files[file].record_bytes)
    return problems


def _states(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the decoding states."""
    problems = []
    for point in {manifest.head, manifest.finished or manifest.head}:
        try:
            read_state(folder, point, verify=True)
        except FileNotFoundError as error:
            problems.append(f"{error.filename}: missing")
        except DRTError as error:
            problems.append(str(error))
    return problems


def _index(folder: Path, width: int, on_progress: Callable[[int], None] | None) -> list[str]:
    """What is wrong with the index of landmarks, where there is one."""
    path = folder / INDEX_FILE
    try:
        point = indexed_point(folder)
        if point is not None:
            check_index(folder, point)
            check_whole(folder, width)
            if on_progress is not None:
                on_progress(path.stat().st_size)
    except DRTError as error:
        return [str(error)]
    return []
