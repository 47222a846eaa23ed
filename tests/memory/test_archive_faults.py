"""What an archive makes of killed writers, damaged files, full disks and many readers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import CHUNKS, DESCRIPTION, offer, text, tree, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, verify_archive
from drt.memory.archive import ArchiveStore
from drt.memory.manifest import MAX_COUNT, Manifest, Point, Segment, _text

SEGMENTS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of `SEGMENTS` segments, written without interruption."""
    path = tmp_path_factory.mktemp("whole") / "archive"
    write(path, SEGMENTS)
    return path


class Writers:
    """Starts and kills writers; see `killed_writer`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killed_writer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, segments: int, microseconds: int = 0) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(folder, segments, microseconds, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    started = Writers()
    yield started
    started.process.communicate()


def holds(path: Path) -> int:
    """Segments that a writer finds, all of which are what was written."""
    with ArchiveWriter.open(path) as writer:
        store = writer.store()
        for segment in range(writer.num_segments):
            keys, values, landmarks, lengths, _ = offer(segment)
            indices = (segment * CHUNKS + torch.arange(CHUNKS)).view(1, 1, -1)
            read = store.gather(indices)
            assert torch.equal(read.keys[:, 0], keys.bfloat16())
            assert torch.equal(read.values[:, 0], values.bfloat16())
            assert torch.equal(read.lengths[:, 0], lengths)
            assert torch.equal(store.landmark_blocks().read(indices)[:, 0], landmarks)
            sources = [writer.source(segment * CHUNKS + n) for n in range(CHUNKS)]
            assert b"".join(source.text for source in sources) == text(segment)
        if writer.num_segments:
            assert writer.state()["at"].tolist() == [writer.num_segments - 1]
        return writer.num_segments


def test_a_writer_killed_at_any_moment_leaves_its_last_commit(
    whole: Path, writers: Writers, tmp_path: Path
) -> None:
    """50 kills of builds and of appends; each archive is then gone on with to the bytes of an uninterrupted one."""
    rng = random.Random(0)
    writers.run(tmp_path / "warm", SEGMENTS)
    reached, killed, number = set(), 0, 0
    longest = 100_000  # microseconds; adapted to the machine
    while killed < 50:
        number += 1
        path = tmp_path / str(number)
        if number % 2:  # an append to a finished archive
            writers.run(path, 2)
        outcome = writers.run(path, SEGMENTS, rng.randint(1, longest))
        longest = max(2000, int(longest * (0.9 if outcome == "finished" else 1.03)))
        killed += outcome == "killed"
        assert outcome in ("killed", "finished")
        if (path / "manifest.json").exists():
            committed = holds(path)
            reached.add(committed)
            if number % 2:
                assert committed >= 2
                with Archive.open(path) as archive:  # readers see whole appends
                    assert archive.num_segments == (SEGMENTS if committed == SEGMENTS else 2)
        assert writers.run(path, SEGMENTS) == "finished"
        assert tree(path) == tree(whole)
    assert len(reached) > 3, "the moments must differ"


def damage(rng: random.Random, path: Path) -> str:
    """Flip a random bit of a random byte of an archive, or cut a file; returns the file's name."""
    files = sorted(file for file in path.iterdir() if file.stat().st_size)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    file.write_bytes(content)
    return file.name


def read_all(path: Path) -> None:
    with Archive.open(path) as archive:
        store = archive.store()
        store.gather(torch.arange(archive.num_chunks).view(1, 1, -1))
        for _ in store.landmark_blocks():
            pass
        for chunk in range(archive.num_chunks):
            archive.source(chunk)


def test_damage_is_found_named_and_never_read(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "archive"
    contents = {file.name: file.read_bytes() for file in whole.iterdir()}
    path.mkdir()
    for number in range(240):
        for name, content in contents.items():
            (path / name).write_bytes(content)
        if number == 0:
            assert verify_archive(path) == []
            read_all(path)
        name = damage(rng, path)
        problems = verify_archive(path)
        assert problems, f"damage {number} to {name}"
        assert any(name in problem for problem in problems), (name, problems)
        with pytest.raises(DRTError, match=name):
            read_all(path)


@pytest.mark.parametrize("name", ["chunks.bin", "landmarks.bin", "index.bin", "text.bin"])
def test_damage_since_the_last_reading_is_found(whole: Path, tmp_path: Path, name: str) -> None:
    """A reader that stays open checks what it reads, not what it read before."""
    path = tmp_path / "archive"
    shutil.copytree(whole, path)
    last = SEGMENTS * CHUNKS - 1
    with Archive.open(path) as archive, Archive.open(path, verify=False) as trusting:
        store = archive.store()

        def use(store: ArchiveStore, archive: Archive) -> None:
            store.gather(torch.tensor([[[last]]]))
            for _ in store.landmark_blocks():
                pass
            archive.source(last)

        use(store, archive)
        with (path / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(DRTError, match=name):
            use(store, archive)
        if name == "landmarks.bin":
            with pytest.raises(DRTError, match=name):
                store.landmark_blocks().read(torch.tensor([[[0, last]]]))
        use(trusting.store(), trusting)


def test_any_range_of_the_text_is_read(whole: Path) -> None:
    joined = b"".join(map(text, range(SEGMENTS)))
    with Archive.open(whole) as archive:
        first, *_, last = archive.documents
        for low, high in ((0, 0), (0, 1), (3, 24), (11, 13), (12, 24), (5, 30), (23, 96)):
            assert archive.text(first, low, high) == joined[low:high]
        assert archive.text(last, 24, 24) == b""


def test_a_missing_file_is_named(whole: Path, tmp_path: Path) -> None:
    for missing in [file.name for file in whole.iterdir() if file.name != "lock"]:
        path = tmp_path / missing
        path.mkdir()
        for file in whole.iterdir():
            if file.name != missing:
                (path / file.name).write_bytes(file.read_bytes())
        assert any(missing in problem for problem in verify_archive(path))
        with pytest.raises(DRTError, match=missing):
            Archive.open(path)


def test_a_full_disk_is_named_and_the_last_commit_stays(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; the largest file meets it inside of a segment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "archive"
    record = (whole / "chunks.bin").stat().st_size // SEGMENTS
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(3.5 * record), hard))
    try:
        with pytest.raises(DRTError, match=r"chunks\.bin: cannot be written: File too large"):
            write(path, SEGMENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert holds(path) == 3
    write(path, SEGMENTS)
    assert tree(path) == tree(whole)


def test_eight_readers_while_a_writer_appends(writers: Writers, tmp_path: Path) -> None:
    """Each sees whole appends, whatever the writer is doing."""
    path = tmp_path / "archive"
    write(path, 2)
    done = False

    def keep_reading(_: int) -> set[int]:
        seen = set()
        while not done or len(seen) == 0:
            with Archive.open(path) as archive:
                seen.add(archive.num_segments)
                assert archive.state()["at"].tolist() == [archive.num_segments - 1]
                last = archive.num_chunks - 1
                assert archive.source(last).text == text(archive.num_segments - 1)[-3:]
                keys = archive.store().gather(torch.tensor([[[last]]])).keys
                assert torch.equal(keys[0, 0], offer(archive.num_segments - 1)[0][0, -1:].bfloat16())
        return seen

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(keep_reading, n) for n in range(8)]
        for segments in range(4, 24, 2):
            assert writers.run(path, segments) == "finished"
        done = True
        seen = set().union(*(one.result() for one in found))
    assert seen <= set(range(2, 24, 2))
    assert len(seen) > 1


def test_a_second_writer_is_refused_until_the_first_is_gone(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    write(path, 2)
    with ArchiveWriter.open(path) as writer:
        with pytest.raises(DRTError, match="another process is writing to"):
            ArchiveWriter.open(path)
        assert writer.num_segments == 2
    ArchiveWriter.open(path).close()


def test_what_is_no_archive(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DRTError, match=r"is not an archive: it has no manifest\.json"):
        Archive.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DRTError, match="is an archive already"):
        ArchiveWriter.create(whole, DESCRIPTION)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DRTError, match=r"holds other files \(letter.txt\)"):
        ArchiveWriter.create(tmp_path, DESCRIPTION)
    assert verify_archive(tmp_path / "nowhere") == [
        f"{tmp_path / 'nowhere'} is not an archive: it has no manifest.json"
    ]


def test_a_later_format_is_named(whole: Path, tmp_path: Path) -> None:
    value = json.loads((whole / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(value | {"format_version": 2}))
    with pytest.raises(DRTError, match="format version 2, but this drt reads version 1"):
        Archive.open(tmp_path)


def test_what_a_writer_refuses(tmp_path: Path) -> None:
    with ArchiveWriter.create(tmp_path / "a", DESCRIPTION) as writer:
        store = writer.store()
        with pytest.raises(ValueError, match="begin a document"):
            store.append(*offer(0))
        store = writer.store()
        writer.begin_document("one")
        with pytest.raises(ValueError, match="the document one has not ended"):
            writer.begin_document("two")
        store.append(*offer(0))
        with pytest.raises(ValueError, match="expected the text of 4 chunks"):
            writer.add_text(b"x", torch.tensor([1]).numpy())
        store.select_rows(torch.tensor([0, 0]))
        with pytest.raises(DRTError, match="has one row"):
            store.append(*(x.expand(2, *x.shape[1:]) for x in offer(1)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else ()
    return [at, *(path for key in keys for path in paths_of(value[key], (*at, key)))]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_manifest_is_read_or_refused(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """With a right checksum over something wrong, and with anything at all in place of a part."""
    value = json.loads((whole / "manifest.json").read_text())
    at = data.draw(st.sampled_from(paths_of(value)[1:]))
    target = value
    for key in at[:-1]:
        target = target[key]
    target[at[-1]] = data.draw(JSON)
    if data.draw(st.booleans()) and at != ("sha256",):
        value.pop("sha256")
        value["sha256"] = hashlib.sha256(_text(value)).hexdigest()
    (tmp_path / "manifest.json").write_bytes(_text(value))
    try:
        read = Manifest.load(tmp_path / "manifest.json")
    except DRTError:
        return
    assert read.dump() == _text(value)


@given(
    st.builds(
        Point,
        segments=st.integers(0, MAX_COUNT),
        journal_bytes=st.integers(0, MAX_COUNT),
        chunks=st.integers(2**40, MAX_COUNT),
        tokens=st.integers(0, 2**40),
        text_bytes=st.integers(0, MAX_COUNT),
    )
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_is_read_as_it_was_written(tmp_path: Path, point: Point) -> None:
    manifest = Manifest(DESCRIPTION, point, None)
    (tmp_path / "manifest.json").write_bytes(manifest.dump())
    assert Manifest.load(tmp_path / "manifest.json") == manifest


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=60)
def test_any_line_of_a_journal_is_read_or_refused(line: bytes) -> None:
    try:
        segment = Segment.parse(line)
    except (ValueError, RecursionError):
        return
    assert Segment.parse(segment.line()) == segment


def test_a_store_that_writes_cannot_be_cleared(tmp_path: Path) -> None:
    """What is appended afterwards would not reach the files."""
    write(tmp_path / "archive", 2)
    with ArchiveWriter.open(tmp_path / "archive") as writer:
        store = writer.store()
        with pytest.raises(ValueError, match="an archive that is written to cannot be cleared"):
            store.clear()
        assert store.counts.tolist() == [2 * CHUNKS]
