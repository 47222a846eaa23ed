"""The folder of an archive: which names in it are the archive's own, its lock, and making one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from drt.errors import DRTError
from drt.files import FileLock, lock_file
from drt.memory.approximate_index import INDEX_FILE
from drt.memory.archive import JOURNAL, MANIFEST
from drt.memory.manifest import DATA_FILES, Manifest

LOCK = "lock"
_EMPTY_AT_FIRST = frozenset((LOCK, JOURNAL, *DATA_FILES))
_STATE = r"state-\d{8,}\.safetensors"
_HALF = r"\.{}\.\w{{8}}\.tmp"  # of a file that `atomic_write` was writing
_HALF_MANIFEST = re.compile(_HALF.format(re.escape(MANIFEST)))
_STALE = re.compile(f"{_STATE}|{_HALF.format(f'({re.escape(MANIFEST)}|{re.escape(INDEX_FILE)}|{_STATE})')}")


def lock_archive(folder: Path) -> FileLock:
    """Lock an archive for writing.

    Raises:
        DRTError: another process is writing to it, or it cannot be locked.
    """
    return lock_file(folder / LOCK, f"another process is writing to {folder}; wait until it has finished")


def remove_stale(folder: Path, wanted: set[str | None]) -> None:
    """Delete decoding states but the expected ones, and halves of files that were being replaced.

    Only regular files with names that an archive gives are looked at: all else in the folder is somebody else's.

    Raises:
        DRTError: a file cannot be deleted.
    """
    for path in _own_files(folder):
        if _STALE.fullmatch(path.name) and path.name not in wanted:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise DRTError(f"{path}: cannot be removed: {error.strerror}") from error


class NewFolder:
    """A folder that becomes an archive, made if it is missing and locked; nothing that it holds is ever overwritten.

    Besides an empty folder it may be what a killed creation has left: empty files of an archive's names, or an archive
    to which nothing was committed.

    Args:
        folder: its path.

    Attributes:
        lock: of the archive; `discard` gives it back.

    Raises:
        DRTError: the folder is an archive already, holds something else, cannot be made, or another process is writing
            to it. What was made until then is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held = self._check()  # without a lock: a folder that is refused gets no lock file
            self.lock = lock_archive(folder)
        except (DRTError, OSError) as error:
            self._remove_folders()
            if isinstance(error, OSError):
                raise DRTError(f"{folder}: cannot be made: {error.strerror}") from error
            raise
        try:
            self._check()  # again: another process may have made one meanwhile
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was made, the lock last; files that were there before are empty again."""
        for path in sorted(_own_files(self._folder), key=_last_to_go):
            with suppress(OSError):  # what led to this shall be told, not this
                if path.name not in self._held:
                    path.unlink()
                elif path.name in _EMPTY_AT_FIRST:
                    os.truncate(path, 0)
        self.lock.close()
        self._remove_folders()

    def _check(self) -> set[str]:
        """Names of the files that the folder holds and that shall stay; raises DRTError if it must not be used."""
        if os.path.lexists(self._folder / MANIFEST):
            if Manifest.load(self._folder / MANIFEST).head.segments:
                raise DRTError(
                    f"{self._folder} is an archive already; append to it, or choose another folder"
                )
            return set()
        own = {path.name for path in _own_files(self._folder) if _is_left_by_creation(path)}
        others = sorted(set(os.listdir(self._folder)) - own)
        if others:
            raise DRTError(
                f"{self._folder} holds other files ({', '.join(others[:3])}); choose an empty folder"
            )
        return own

    def _remove_folders(self) -> None:
        for part in self._made:
            with suppress(OSError):  # not made, or holds what another process has put there
                part.rmdir()


def _own_files(folder: Path) -> Iterator[Path]:
    """The regular files in a folder that have names of an archive's."""
    names = _EMPTY_AT_FIRST | {MANIFEST, INDEX_FILE}
    for path in folder.iterdir():
        if (path.name in names or _STALE.fullmatch(path.name)) and path.is_file() and not path.is_symlink():
            yield path


def _is_left_by_creation(path: Path) -> bool:
    """Whether a file of an archive's name may come from a creation that was killed before it had a manifest."""
    if path.name in _EMPTY_AT_FIRST:
        return path.stat().st_size == 0
    return _HALF_MANIFEST.fullmatch(path.name) is not None


def _last_to_go(path: Path) -> int:
    """Data first, while a manifest still says whose they are; the lock when nothing else is left."""
    return {MANIFEST: 1, LOCK: 2}.get(path.name, 0)
