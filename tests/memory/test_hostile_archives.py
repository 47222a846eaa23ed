"""Archives whose checksums are right and whose content no writer made: a stranger's, or an older version's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CHUNKS, DESCRIPTION, offer, write
from safetensors.torch import save

from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, verify_archive
from drt.memory.archive_files import INDEX
from drt.memory.manifest import Manifest, _text

SEGMENTS = 2
HUGE = 10**15


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "archive"
    write(path, SEGMENTS)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "archive"))


def forge(path: Path, change: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """Change the manifest and the lines of the journal, and make every checksum that of what there is."""
    manifest = json.loads((path / "manifest.json").read_text())
    lines = [json.loads(line) for line in (path / "segments.jsonl").read_bytes().splitlines()]
    held = manifest["head"]["journal_bytes"]
    change(manifest, lines)
    journal = b"".join(
        line if isinstance(line, bytes) else json.dumps(line, separators=(",", ":")).encode() + b"\n"
        for line in lines
    )
    (path / "segments.jsonl").write_bytes(journal)
    for point in ("head", "finished"):
        manifest[point] = {"journal_sha256": hashlib.sha256(journal).hexdigest()} | {
            name: value for name, value in manifest[point].items() if name != "journal_sha256"
        }
        if manifest[point]["journal_bytes"] == held:
            manifest[point]["journal_bytes"] = len(journal)
    del manifest["sha256"]
    names = (
        "segments",
        "journal_bytes",
        "journal_sha256",
        "chunks",
        "tokens",
        "text_bytes",
        "state_bytes",
        "state_sha256",
    )
    for point in ("head", "finished"):
        manifest[point] = {name: manifest[point][name] for name in names}
    digest = hashlib.sha256(_text(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(_text(manifest | {"sha256": digest}))


def read_all(path: Path) -> None:
    with Archive.open(path) as archive:
        store = archive.store()
        store.gather(torch.arange(archive.num_chunks).view(1, 1, -1))
        list(store.landmark_blocks())
        for chunk in range(archive.num_chunks):
            archive.source(chunk)


def assert_refused(path: Path, name: str) -> None:
    """By readers and by verify, which name the file."""
    with pytest.raises(DRTError, match=name):
        read_all(path)
    problems = verify_archive(path)
    assert any(re.search(name, problem) for problem in problems), problems


def test_a_forgery_without_a_change_is_whole(path: Path) -> None:
    forge(path, lambda manifest, lines: None)
    read_all(path)
    assert verify_archive(path) == []


@pytest.mark.parametrize("field", ["chunk_size", "num_heads", "head_dim", "landmark_size", "segment_size"])
@pytest.mark.parametrize("value", [HUGE, 2**27, -1, 0])
def test_absurd_sizes(path: Path, field: str, value: int) -> None:
    if field == "segment_size" and value == 2**27:
        value = 2**40
    forge(path, lambda manifest, lines: manifest["description"].update({field: value}))
    name = r"landmarks\.bin" if (field, value) == ("landmark_size", 2**27) else r"manifest\.json"
    assert_refused(path, name)


@pytest.mark.parametrize(
    "field", ["segments", "journal_bytes", "chunks", "tokens", "text_bytes", "state_bytes"]
)
@pytest.mark.parametrize("value", [HUGE, 10**30, -1])
def test_absurd_counts_in_the_manifest(path: Path, field: str, value: int) -> None:
    forge(
        path,
        lambda manifest, lines: [manifest[point].update({field: value}) for point in ("head", "finished")],
    )
    name = "state-" if (field, value) == ("state_bytes", HUGE) else r"manifest\.json|segments\.jsonl"
    assert_refused(path, name)


@pytest.mark.parametrize("field", ["chunks", "tokens", "text_bytes"])
def test_absurd_counts_everywhere(path: Path, field: str) -> None:
    """The manifest and the journal agree; the files do not hold so much."""

    def change(manifest: dict[str, Any], lines: list[Any]) -> None:
        lines[0]["parts"][0][field] += HUGE
        for point in ("head", "finished"):
            manifest[point][field] += HUGE

    forge(path, change)
    names = {"chunks": r"chunks\.bin", "tokens": r"manifest\.json", "text_bytes": r"text\.bin"}
    assert_refused(path, names[field])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 10**5 + b"\n",
        b'{"crc32":' + b"[" * 10**5 + b"\n",
        b'{"crc32":[1,2,3,4],"parts":[' + b'{"a":' * 10**5 + b"\n",
        b'{"crc32":[1,2,3,4],"parts":[{"name":"x","begins":true,"ends":true,"chunks":1e9,"tokens":1,"text_bytes":1}]}\n',
        b"1" * 10**5 + b"\n",
    ],
)
def test_absurd_lines_of_the_journal(path: Path, line: bytes) -> None:
    forge(path, lambda manifest, lines: lines.__setitem__(1, line))
    assert_refused(path, r"segments\.jsonl")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"format":' * 10**5, b" " * 2**21])
def test_absurd_manifests(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    assert_refused(path, r"manifest\.json")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "segments.jsonl", "chunks.bin", "landmarks.bin", "index.bin", "text.bin", "state"],
)
def test_links_and_pipes_in_place_of_files(path: Path, name: str) -> None:
    file = next(path.glob(f"{name}*"))
    for make in (
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to(made_elsewhere(path, file)),
        lambda: os.mkfifo(file),
        file.mkdir,
    ):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        make()
        assert_refused(path, f"{file.name}: expected a regular file")


def made_elsewhere(path: Path, file: Path) -> Path:
    elsewhere = path.parent / "elsewhere"
    elsewhere.write_bytes(b"secret")
    return elsewhere


def replace_state(path: Path, content: bytes) -> None:
    file = next(path.glob("state-*"))
    file.write_bytes(content)

    def change(manifest: dict[str, Any], lines: list[Any]) -> None:
        for point in ("head", "finished"):
            manifest[point] |= {
                "state_bytes": len(content),
                "state_sha256": hashlib.sha256(content).hexdigest(),
            }

    forge(path, change)


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 100,
        (2**62).to_bytes(8, "little") + b"{}",
        (100_000).to_bytes(8, "little") + b"[" * 10**5,
        save({"at": torch.tensor([float("nan")])}),
        save({"at": torch.tensor([float("inf")]).half()}),
    ],
)
def test_absurd_states(path: Path, content: bytes) -> None:
    replace_state(path, content)
    assert_refused(path, r"state-\d+\.safetensors")


@pytest.mark.parametrize(("start", "stop"), [(-5, 3), (0, HUGE), (3, 0), (2**62, 2**62 + 1), (0, 25)])
def test_text_that_lies_outside_its_document(path: Path, start: int, stop: int) -> None:
    entries = np.fromfile(path / "index.bin", INDEX)
    entries[1]["start"], entries[1]["stop"] = start, stop
    entries.tofile(path / "index.bin")
    crc32 = zlib.crc32(entries[:CHUNKS].tobytes())
    forge(path, lambda manifest, lines: lines[0]["crc32"].__setitem__(2, crc32))
    assert_refused(path, r"index\.bin")


@pytest.mark.parametrize("what", ["keys", "values", "landmarks"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float
) -> None:
    """Earlier versions wrote infinity where float16 could not hold a number."""
    new = list(offer(0))
    new[("keys", "values", "landmarks").index(what)].flatten()[7] = value
    path = tmp_path / "archive"
    with ArchiveWriter.create(path, DESCRIPTION) as writer:
        writer.begin_document("one")
        with pytest.raises(DRTError, match=f"expected {what} of chunks that are finite"):
            writer.store().append(*new)
        monkeypatch.setattr("drt.memory.chunk_codec.is_finite", lambda tensor: True)
        writer.store().append(*new)
        writer.end_document()
        writer.commit({}, finished=True)
    assert_refused(path, r"landmarks\.bin" if what == "landmarks" else r"chunks\.bin")
    assert len(verify_archive(path)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_committed(path: Path, value: float) -> None:
    with ArchiveWriter.open(path) as writer:
        writer.begin_document("one")
        with pytest.raises(DRTError, match="NaN or infinity in at"):
            writer.commit({"at": torch.tensor([value])}, finished=True)
    assert verify_archive(path) == []


@pytest.mark.parametrize("file", ["state", "segments.jsonl"])
def test_a_file_of_holes_is_not_read(path: Path, file: str) -> None:
    """It takes no room on a disk, and all of it in memory."""
    size = 2**40
    name = "state_bytes" if file == "state" else "journal_bytes"
    forge(path, lambda manifest, lines: [manifest[p].update({name: size}) for p in ("head", "finished")])
    with next(path.glob(f"{file}*")).open("r+b") as opened:
        opened.truncate(size)
    assert_refused(path, f"{file}.*: expected at most")


@pytest.mark.parametrize("length", [-1, 10**12])
def test_lengths_that_no_chunk_has(tmp_path: Path, length: int) -> None:
    new = list(offer(0))
    new[3][0, 1] = length
    path = tmp_path / "archive"
    with ArchiveWriter.create(path, DESCRIPTION) as writer:
        writer.begin_document("one")
        writer.store().append(*new)
        writer._parts[-1] = writer._parts[-1].__class__("one", True, True, CHUNKS, CHUNKS, 0)
        writer.commit({}, finished=True)
    assert_refused(path, r"chunks\.bin")


def test_a_segment_too_large_for_memory_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its landmarks are searched as one block; files of holes may hold any number of them."""
    monkeypatch.setattr("drt.memory.archive_files.MAX_BLOCK_BYTES", 1)
    assert_refused(path, r"landmarks\.bin: expected at most")


def test_a_segment_that_could_not_be_read_is_not_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArchiveWriter.open(path) as writer:
        before = writer.num_chunks
        monkeypatch.setattr("drt.memory.archive_files.MAX_BLOCK_BYTES", 1)
        writer.begin_document("more")
        writer.store().append(*offer(7))
        with pytest.raises(DRTError, match="commit more often"):
            writer.commit({}, finished=True)
    monkeypatch.undo()
    with Archive.open(path) as archive:
        assert archive.num_chunks == before


def test_what_is_missing_is_said_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader reads again only where a writer has committed meanwhile."""
    loads: list[Path] = []
    load = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda name: loads.append(name) or load(name))
    next(path.glob("state-*")).unlink()
    with pytest.raises(DRTError, match=r"state-.*: missing"):
        Archive.open(path)
    assert len(loads) == 2
