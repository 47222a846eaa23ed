"""The Linux source out of a Debian package: which files are taken, and what is wrong with another package."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from drt.data.linux import fetch_linux
from drt.errors import DRTError

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, as Debian has it")

FILES = {
    "linux-source-6.1/kernel/fork.c": b"int fork;",
    "linux-source-6.1/include/a.h": b"int a;",
    "linux-source-6.1/drivers/gpu/drm/amd/include/huge.h": b"generated",
    "linux-source-6.1/README": b"no code",
    "linux-source-6.1/../outside.c": b"evil",
}


def build_package(folder: Path, files: dict[str, bytes]) -> None:
    """A package as Debian makes it: an archive inside an archive."""
    inside = folder / "package" / "usr" / "src"
    inside.mkdir(parents=True)
    with tarfile.open(inside / "linux-source-6.1.tar.xz", "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / "package" / "DEBIAN").mkdir()
    (folder / "package" / "DEBIAN" / "control").write_text(
        "Package: linux-source-6.1\nVersion: 6.1.1-1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (folder / "downloads").mkdir()
    target = folder / "downloads" / "linux-source-6.1_6.1.1-1_all.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(folder / "package"), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(folder / "package")


def test_c_files_are_unpacked(tmp_path: Path) -> None:
    build_package(tmp_path, FILES)
    seen: list[str] = []
    manifest = fetch_linux(tmp_path, seen.append)
    written = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix in (".c", ".h")
    }
    assert written == {"linux/kernel/fork.c": b"int fork;", "linux/include/a.h": b"int a;"}
    assert seen == ["kernel/fork.c", "include/a.h"]
    assert manifest == json.loads((tmp_path / "linux.json").read_text())
    assert (manifest["files"], manifest["bytes"]) == (2, 15)
    assert manifest["file"] == "linux-source-6.1_6.1.1-1_all.deb"
    seen.clear()
    assert fetch_linux(tmp_path, seen.append) == manifest
    assert seen == []


def test_other_packages_are_refused(tmp_path: Path) -> None:
    build_package(tmp_path, {"linux-source-6.1/README": b"no code"})
    with pytest.raises(DRTError, match="got no C file"):
        fetch_linux(tmp_path)
    assert not (tmp_path / "linux").exists()


def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    build_package(tmp_path, FILES)
    package = next((tmp_path / "downloads").iterdir())
    package.write_bytes(package.read_bytes()[:-200])
    with pytest.raises(DRTError, match=r"linux-source-6\.1_6\.1\.1-1_all\.deb is damaged.*delete the file"):
        fetch_linux(tmp_path)


def test_apt_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(DRTError, match="through apt-get, which this system does not have"):
        fetch_linux(tmp_path / "output")
    (bin_folder / "apt-get").write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 100\n")
    (bin_folder / "apt-get").chmod(0o755)
    with pytest.raises(DRTError, match=r"could not be downloaded.*\nE: no such package"):
        fetch_linux(tmp_path / "output")


def test_a_folder_of_that_name_that_is_there_already_stays(tmp_path: Path) -> None:
    build_package(tmp_path, FILES)
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux" / "thesis.c").write_text("years of work")
    with pytest.raises(DRTError, match=r"linux is there without linux\.json"):
        fetch_linux(tmp_path)
    assert (tmp_path / "linux" / "thesis.c").read_text() == "years of work"


def test_one_process_fetches_at_a_time(tmp_path: Path) -> None:
    build_package(tmp_path, FILES)

    def fetch_too(name: str) -> None:
        with pytest.raises(DRTError, match="another process is fetching"):
            fetch_linux(tmp_path)

    fetch_linux(tmp_path, fetch_too)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "linux", "linux.json"]
