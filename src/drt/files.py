"""Files on disk: regular files only, written whole or not at all, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, NoReturn, Self
from weakref import WeakSet

from drt.errors import DRTError

LOCK = "lock"  # of `lock_folder`
# What an operating system answers where a file system has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def open_regular(
    path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o666, *, follow: bool = False
) -> int:
    """Open a regular file and return its descriptor; a symbolic link, device, pipe or folder is refused.

    Args:
        path: of the file. Folders on the way to it may be links, the file itself may not.
        flags: as for `os.open`.
        mode: permissions of a file that is made.
        follow: allow a link to a regular file, for files that are only read: the Hugging Face cache is full of them.

    Raises:
        DRTError: the file cannot be opened or is not a regular file; the message names it.
    """
    no_follow = 0 if follow else os.O_NOFOLLOW
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for its other end.
        descriptor = os.open(path, flags & ~os.O_TRUNC | no_follow | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise DRTError(f"{path}: expected a regular file, got a symbolic link") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise DRTError(f"{path}: expected a regular file, got {_describe_target(path)}") from error
        done = "read" if flags & os.O_ACCMODE == os.O_RDONLY else "written"
        raise DRTError(f"{path}: cannot be {done}: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        through = "a link to " if follow and os.path.islink(path) else ""
        raise DRTError(f"{path}: expected a regular file, got {through}{_kind(mode)}")
    # Only now: truncating a device or the target of a link would be too late to refuse.
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        DRTError: something else is there, or it cannot be made; the message names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DRTError(
            f"{folder}: expected a folder or a new name, got {_describe_target(folder)}"
        ) from error
    except OSError as error:
        raise DRTError(f"{folder}: cannot be made: {error.strerror}") from error


def check_output(path: Path) -> None:
    """Make sure that a file could be written at ``path``: nothing is there, or a regular file.

    Raises:
        DRTError: a symbolic link, device, pipe or folder is there; the message says which.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DRTError(f"{path}: cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DRTError(f"{path}: expected a regular file or a new name, got {describe_kind(path)}")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the place of ``path`` when the block ends, whole or not at all.

    The bytes go to a temporary file with a name of its own in the same folder. It is synced, renamed, and the folder is
    synced. If the block raises, ``path`` stays as it was and the temporary file is removed.

    Raises:
        DRTError: ``path`` is a symbolic link, device, pipe or folder, or writing fails; the message names ``path``.
    """
    path = Path(path)
    check_output(path)
    temporary: str | None = None
    try:
        # 0o600 of mkstemp is for secrets: the file gets what a new file or the one that it replaces has.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), _permissions(path))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise DRTError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; errors as `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def fill_folder(folder: Path | str) -> Iterator[Path]:
    """Make a temporary folder whose files move into ``folder`` when the block ends: for libraries that write by name.

    Files of the same names are replaced, others stay. If the block raises, ``folder`` stays as it was.

    Args:
        folder: made if it is missing.

    Raises:
        DRTError: ``folder`` cannot be made or written, or a name in it is a link, device, pipe or folder.
    """
    folder = Path(folder)
    make_folder(folder)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
        yield temporary
        names = [path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()]
        for name in names:
            check_output(folder / name)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            _sync(temporary / name)
            os.replace(temporary / name, folder / name)
        sync_folder(folder)
    except OSError as error:
        raise DRTError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes ``folder`` when the block ends, whole or not at all.

    Its files and names are synced before it is renamed. If the block raises, nothing is left of it.

    Args:
        folder: where nothing is yet.

    Raises:
        DRTError: something is there, or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        temporary.chmod(0o777 & ~_mask())
        yield temporary
        sync_tree(temporary)
        if os.path.lexists(folder):
            raise DRTError(f"{folder}: expected nothing there, got {describe_kind(folder)}")
        os.rename(temporary, folder)
        temporary = None
        sync_folder(folder.parent)
    except OSError as error:
        raise DRTError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power loss."""
    _sync(folder, os.O_DIRECTORY)


def sync_tree(folder: Path) -> None:
    """Make everything in a folder, and the names in it, outlive a power loss."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    sync_folder(folder)


class FileLock:
    """A lock that `lock_file` took: held until `close`, or until the process that took it ends.

    A process forked meanwhile does not have it: it neither keeps it after its parent's end nor gives it back.
    """

    _held: ClassVar[WeakSet[FileLock]] = WeakSet()

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lock belongs to the process that took it: it cannot be pickled or copied")

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Let another process have it; again is no error."""
        if self.is_held:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a child that forks just now has the descriptor too
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    @classmethod
    def _forget(cls) -> None:
        """In a forked child: only close, for to unlock would unlock for the parent too."""
        for lock in [lock for lock in cls._held if lock.is_held]:
            lock._close()


os.register_at_fork(after_in_child=FileLock._forget)


def lock_file(path: Path, busy: str) -> FileLock:
    """Lock a file for one writer.

    Args:
        path: of the lock file; it is made if it is not there. One that was made is removed again where there are no
            locks.
        busy: message of the error when another process holds the lock.

    Raises:
        DRTError: another process holds the lock; the file system has no locks; the file cannot be opened.
    """
    while True:
        is_new = not os.path.lexists(path)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            _flock(descriptor)
            if _is_at(descriptor, path):
                return FileLock(descriptor)
            os.close(descriptor)  # another process has removed the file meanwhile, and with it the lock
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DRTError(busy) from error
            if is_new:
                path.unlink(missing_ok=True)
            if error.errno in _NO_LOCKS:
                raise DRTError(
                    f"{path}: this file system does not support locks ({error.strerror}); use a folder on a local disk"
                ) from error
            raise DRTError(f"{path}: cannot be locked: {error.strerror}") from error


@contextmanager
def lock_folder(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder if it is missing, and keep other processes out of it with a lock file, which is removed at the end.

    A folder that nothing was written to is removed again.

    Raises:
        DRTError: as `make_folder` and `lock_file`.
    """
    make_folder(folder)
    path = folder / LOCK
    with lock_file(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; nothing is made where there is none."""
    try:
        descriptor = open_regular(path)
    except DRTError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def _flock(descriptor: int) -> None:
    """Lock at once, or after as short a wait as `is_locked` may hold the lock."""
    for wait in (0.01, 0.05, 0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait:
                raise
            time.sleep(wait)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that now lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def check_inputs(folder: Path) -> None:
    """Make sure that a library can read what lies in a folder: every file is a regular one, or a link to one.

    Raises:
        DRTError: a device, pipe or socket is there, or a link to one; the message names it.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DRTError(f"{path}: expected a regular file, got {_describe_target(path)}")


def read_bytes(path: Path | str, max_bytes: int | None = None, *, follow: bool = False) -> bytes:
    """Read a whole file that may come from a stranger; ``follow`` as for `open_regular`.

    Raises:
        DRTError: not a regular file, larger than ``max_bytes``, or it cannot be read.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise DRTError(f"{path}: expected at most {max_bytes:,} bytes, got {size:,}")
        try:
            return file.read(size)  # not so many as it might have: so much memory would be taken at once
        except OSError as error:
            raise DRTError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: Path | str, max_bytes: int = 2**26, *, follow: bool = False) -> Any:
    """Read a JSON file that may come from a stranger; ``follow`` as for `open_regular`.

    Raises:
        DRTError: not a regular file, larger than ``max_bytes``, not UTF-8, not JSON, or nested too deeply.
    """
    content = read_bytes(path, max_bytes, follow=follow)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DRTError(f"{path}: expected a JSON file: {reason}") from error


def describe_kind(path: Path | str) -> str:
    """What lies at a path, in words, without following a link."""
    try:
        return _kind(os.lstat(path).st_mode)
    except OSError:
        return "nothing"


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "a regular file")


def _describe_target(path: Path | str) -> str:
    """What lies at a path, or where the link at it leads."""
    through = "a link to " if os.path.islink(path) else ""
    return through + describe_kind(os.path.realpath(path))


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _permissions(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
