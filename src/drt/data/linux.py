"""The source code of Linux, out of Debian's package: the C files of a kernel, in the directories they lie in."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from drt.errors import DRTError
from drt.files import lock_folder, make_folder, new_folder, read_json, write_text

PACKAGE = "linux-source-6.1"
SOURCE = "linux"
MANIFEST = "linux.json"
_SUFFIXES = (".c", ".h")
_GENERATED = PurePosixPath("drivers/gpu/drm/amd/include")  # register numbers, a tenth of all bytes


def fetch_linux(output: Path, on_file: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write the C files of Linux below `output / linux`, and `output / linux.json`.

    What is already there is not fetched again.

    Args:
        output: folder, made if it is not there. The package stays in its folder `downloads`.
        on_file: called with the name of each file that is written.

    Returns:
        What linux.json says: `package`, `file` (with the version in its name), `sha256`, `licence`, `files`, `bytes`.

    Raises:
        DRTError: another process is at it, or something else is in the place of the source code; this is no Debian
            system, the package cannot be downloaded, or it is not what it should be.
    """
    with lock_folder(output, f"another process is fetching into {output}; wait until it has finished"):
        return _fetch(output, on_file)


def _fetch(output: Path, on_file: Callable[[str], None]) -> dict[str, Any]:
    if (output / MANIFEST).exists():
        return dict(read_json(output / MANIFEST))
    if os.path.lexists(output / SOURCE):
        raise DRTError(
            f"{output / SOURCE} is there without {MANIFEST}: it is not this command's, or was cut short. Choose "
            "another folder or delete it"
        )
    package = _download(output / "downloads")
    with new_folder(output / SOURCE) as temporary:
        files, size = _unpack(package, temporary, on_file)
        if not files:
            raise DRTError(f"{package}: expected a package with the source code of Linux, got no C file")
    with package.open("rb") as opened:
        checksum = hashlib.file_digest(opened, "sha256").hexdigest()
    manifest = {
        "package": PACKAGE,
        "file": package.name,
        "sha256": checksum,
        "licence": "GPL-2.0 with the syscall exception",
        "files": files,
        "bytes": size,
    }
    write_text(output / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _download(folder: Path) -> Path:
    """Debian's package, through apt, which checks its signature; nothing is installed."""
    make_folder(folder)
    if not list(folder.glob(f"{PACKAGE}_*.deb")):
        try:
            finished = subprocess.run(
                ["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise DRTError(
                f"{PACKAGE} comes from Debian through apt-get, which this system does not have; a kernel's "
                "source from elsewhere works too: drt data prepare --documents directories FOLDER"
            ) from error
        if finished.returncode:
            raise DRTError(
                f"{PACKAGE} could not be downloaded with apt-get (does `apt-get update` help?):\n"
                f"{finished.stderr.strip()}"
            )
    return max(folder.glob(f"{PACKAGE}_*.deb"))


def _unpack(package: Path, folder: Path, on_file: Callable[[str], None]) -> tuple[int, int]:
    """Write the C files; returns their number and bytes."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            stream = cast(IO[bytes], process.stdout)
            counted = _unpack_stream(stream, folder, on_file)
            stream.read()  # what follows the last file: dpkg-deb would die of a closed pipe
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise DRTError(f"{package} is damaged ({error}); delete the file to fetch it anew") from error
    if process.returncode:
        raise DRTError(f"{package} is damaged; delete the file to fetch it anew")
    return counted


def _unpack_stream(stream: IO[bytes], folder: Path, on_file: Callable[[str], None]) -> tuple[int, int]:
    files = size = 0
    with tarfile.open(fileobj=stream, mode="r|") as outer:
        for member in outer:
            if not member.name.endswith(f"{PACKAGE}.tar.xz"):
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                for file in inner:
                    path = PurePosixPath(*PurePosixPath(file.name).parts[1:])
                    if not _is_wanted(file, path):
                        continue
                    on_file(str(path))
                    content = cast(IO[bytes], inner.extractfile(file)).read()
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
                    files, size = files + 1, size + len(content)
    return files, size


def _is_wanted(file: tarfile.TarInfo, path: PurePosixPath) -> bool:
    inside = not path.is_absolute() and ".." not in path.parts
    return file.isfile() and inside and path.suffix in _SUFFIXES and not path.is_relative_to(_GENERATED)
