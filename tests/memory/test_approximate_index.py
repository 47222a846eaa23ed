"""The index of an archive's landmarks: what it finds, what is searched without it, what becomes of a damaged one."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import CHUNKS, DESCRIPTION, WIDTH, offer, write
from torch import Tensor

from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, archive, verify_archive
from drt.memory.approximate_index import INDEX_FILE, IndexArrays, IndexSizes, _checksum
from drt.memory.archive import JOURNAL
from drt.memory.archive_files import ArchivePage
from drt.ops.chunk_retrieval import RetrievedChunks, retrieve_chunks

faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")

SEGMENTS, INDEXED = 50, 40  # an append came after the index was made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "archive"
    write(path, INDEXED)
    with ArchiveWriter.open(path) as writer:
        added: list[int] = []
        writer.index(added.append)
        assert sum(added) == INDEXED * CHUNKS
    write(path, SEGMENTS)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "archive"))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranges of landmarks that are read to be scored, as they come."""
    ranges: list[tuple[int, int]] = []
    landmarks = ArchivePage.landmarks

    def recorded(page: ArchivePage, first: int, last: int) -> Tensor:
        ranges.append((first, last))
        return landmarks(page, first, last)

    monkeypatch.setattr(ArchivePage, "landmarks", recorded)
    monkeypatch.setattr("drt.memory.archive_files.LANDMARK_BLOCK", CHUNKS)
    return ranges


def search(path: Path, how: str, visible: Tensor, *, gumbel: bool = False) -> RetrievedChunks:
    """Two questions' rows of an archive, with a chunk of a conversation behind it."""
    with Archive.open(path) as opened:
        opened.search = how
        store = opened.store()
        store.select_rows(torch.tensor([0, 0]))
        new = [x[:, :1].expand(2, 1, *x.shape[2:]) for x in offer(99)[:4]]
        store.append(*new, torch.tensor([1, 1]))
        generator = torch.Generator().manual_seed(5)
        query = torch.randn(2, visible.shape[1], WIDTH, generator=generator)
        return retrieve_chunks(
            query, store.landmark_blocks(), visible, top_k=3, gumbel=gumbel, generator=generator
        )


def everything(queries: int) -> Tensor:
    return torch.full((2, queries), SEGMENTS * CHUNKS + 1)


def assert_equal(one: RetrievedChunks, other: RetrievedChunks) -> None:
    """Bit for bit: whatever found them, chunks are weighted by their landmarks."""
    for got, wanted in zip(one, other, strict=True):
        assert torch.equal(got, wanted)


def test_the_best_are_found_without_scanning_what_is_indexed(
    path: Path, scanned: list[tuple[int, int]]
) -> None:
    exact = search(path, "exact", everything(60))
    assert sum(last - first for first, last in scanned) == SEGMENTS * CHUNKS
    scanned.clear()
    found = search(path, "index", everything(60))
    assert_equal(found, exact)
    assert scanned[0][0] == INDEXED * CHUNKS
    assert sum(last - first for first, last in scanned) == (SEGMENTS - INDEXED) * CHUNKS
    for part in ((0, INDEXED * CHUNKS), (INDEXED * CHUNKS, SEGMENTS * CHUNKS + 1)):
        assert ((found.chunk_indices >= part[0]) & (found.chunk_indices < part[1])).any(), "both are searched"


def test_a_block_that_begins_among_the_indexed_is_scanned_from_their_end(path: Path) -> None:
    assert_equal(search(path, "index", everything(60)), search(path, "exact", everything(60)))


def test_queries_that_see_nothing_find_nothing(path: Path, scanned: list[tuple[int, int]]) -> None:
    """Such are the queries of a batch's shorter rows."""
    visible = everything(4)
    visible[1, 2:] = 0
    found = search(path, "index", visible)
    assert scanned[0][0] == INDEXED * CHUNKS
    assert_equal(found, search(path, "exact", visible))
    assert found.chunk_indices[1, 2:].eq(-1).all()


def test_queries_that_see_a_part_are_answered_exactly(path: Path, scanned: list[tuple[int, int]]) -> None:
    visible = everything(4)
    visible[0] = torch.tensor([1, CHUNKS, INDEXED * CHUNKS - 1, INDEXED * CHUNKS])
    found = search(path, "index", visible)
    assert scanned[0][0] == 0
    assert (found.chunk_indices < visible.unsqueeze(-1)).all()
    assert_equal(found, search(path, "exact", visible))


def test_noise_is_added_to_every_score(path: Path, scanned: list[tuple[int, int]]) -> None:
    found = search(path, "index", everything(4), gumbel=True)
    assert scanned[0][0] == 0
    assert_equal(found, search(path, "exact", everything(4), gumbel=True))


def test_landmarks_of_16_bits_are_indexed(tmp_path: Path) -> None:
    description = replace(DESCRIPTION, landmark_dtype="bfloat16")
    with ArchiveWriter.create(tmp_path / "archive", description) as writer:
        store = writer.store()
        writer.begin_document("one")
        for segment in range(SEGMENTS):
            store.append(*offer(segment))
        writer.commit({}, finished=True)
        writer.index()
    assert verify_archive(tmp_path / "archive") == []
    found = search(tmp_path / "archive", "index", everything(20))
    assert_equal(found, search(tmp_path / "archive", "exact", everything(20)))


def test_an_index_is_used_by_default_where_it_covers_enough(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Archive.open(path) as opened:
        assert opened.num_indexed == INDEXED * CHUNKS
        assert opened.store().landmark_blocks().num_indexed == 0
        monkeypatch.setattr(archive, "INDEXED_FROM", INDEXED * CHUNKS)
        assert opened.store().landmark_blocks().num_indexed == INDEXED * CHUNKS
        opened.search = "exact"
        assert opened.store().landmark_blocks().num_indexed == 0
        opened.search = "quick"
        with pytest.raises(ValueError, match="search must be auto, exact, index, got 'quick'"):
            opened.store()
    (path / INDEX_FILE).unlink()
    with Archive.open(path) as opened:
        assert opened.store().landmark_blocks().num_indexed == 0
        opened.search = "index"
        with pytest.raises(DRTError, match="has no landmark index; drt memory index makes one"):
            opened.store()


def test_a_writer_searches_exactly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps shall not hang on whether there is an index."""
    monkeypatch.setattr(archive, "INDEXED_FROM", 1)
    with ArchiveWriter.open(path) as writer:
        assert writer.store().landmark_blocks().num_indexed == 0


def test_a_cleared_store_has_no_index(path: Path) -> None:
    with Archive.open(path) as opened:
        opened.search = "index"
        store = opened.store()
        store.clear()
        new = offer(99)
        store.append(*new)
        found = retrieve_chunks(
            torch.randn(1, 5, WIDTH), store.landmark_blocks(), torch.full((1, 5), 4), top_k=4
        )
    assert store.landmark_blocks().num_indexed == 0
    assert torch.equal(found.chunk_indices.sort(-1).values, torch.arange(4).expand(1, 5, 4))


def test_an_index_made_after_a_reader_opened_is_not_its(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "INDEXED_FROM", 1)
    with Archive.open(path) as opened:
        write(path, SEGMENTS + 2)
        with ArchiveWriter.open(path) as writer:
            writer.index()
        assert opened.store().landmark_blocks().num_indexed == 0
    with Archive.open(path) as opened:
        assert opened.store().landmark_blocks().num_indexed == (SEGMENTS + 2) * CHUNKS


def test_damage_is_found_named_and_never_used(path: Path) -> None:
    assert verify_archive(path) == []
    content = (path / INDEX_FILE).read_bytes()
    rng = random.Random(0)
    for number in range(60):
        damaged = bytearray(content)
        at = rng.randrange(400 if number % 3 else len(content))  # the line of JSON is short
        if number % 2:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            del damaged[at:]
        (path / INDEX_FILE).write_bytes(damaged)
        assert any(INDEX_FILE in problem for problem in verify_archive(path)), number
        with pytest.raises(DRTError, match=INDEX_FILE):
            search(path, "index", everything(1))
        search(path, "exact", everything(1))


def test_a_damaged_landmark_is_not_weighted(path: Path) -> None:
    best = int(search(path, "index", everything(1)).chunk_indices[0, 0, 0])
    content = bytearray((path / "landmarks.bin").read_bytes())
    assert best < INDEXED * CHUNKS
    content[best * WIDTH * 4] ^= 1
    (path / "landmarks.bin").write_bytes(content)
    with pytest.raises(DRTError, match=rf"landmarks\.bin is damaged: .* {INDEX_FILE} was made of"):
        search(path, "index", everything(1))


def test_an_index_of_another_archive_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, 3)
    shutil.copy(path / INDEX_FILE, other)
    message = rf"{INDEX_FILE} was made of another archive"
    assert any(INDEX_FILE in problem for problem in verify_archive(other))
    with pytest.raises(DRTError, match=message), Archive.open(other) as opened:
        opened.store()


def forged(path: Path, **changes: object) -> bytes:
    """An index with another head or other arrays, and the checksum of what it is."""
    line, _, body = (path / INDEX_FILE).read_bytes().partition(b"\n")
    head = json.loads(line)
    arrays = IndexArrays.unpack(body, IndexSizes(head["point"]["chunks"], head["lists"], head["width"]))
    arrays = arrays._replace(**{name: changes.pop(name) for name in arrays._fields if name in changes})
    body = b"".join(array.tobytes() for array in arrays)
    head["point"] |= {name: changes.pop(name) for name in ("chunks", "journal_bytes") if name in changes}
    head |= changes
    head["crc32"] = _checksum({name: value for name, value in head.items() if name != "crc32"}, body)
    return json.dumps(head).encode() + b"\n" + body


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": WIDTH + 1}, f"expected landmarks of {WIDTH} numbers, got {WIDTH + 1}"),
        ({"width": 2**40}, f"expected landmarks of {WIDTH} numbers"),
        ({"lists": 2**50}, r"expected 1 to 160 lists, got \d+"),
        ({"lists": 0}, "expected 1 to 160 lists, got 0"),
        ({"lists": 2}, r"expected \d+ bytes of arrays"),
        ({"lists": "4"}, "expected point, lists, width and crc32"),
        ({"chunks": 10}, r"expected \d+ bytes of arrays"),
        ({"chunks": 10**15}, "has no landmark index"),
        ({"chunks": 0}, "has no landmark index"),
        ({"journal_bytes": 10**15}, "was made of another archive"),
        ({"lists": [[1]]}, "expected point, lists, width and crc32"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    path: Path, changes: dict[str, object], message: str
) -> None:
    (path / INDEX_FILE).write_bytes(forged(path, **changes))
    assert any(INDEX_FILE in problem or JOURNAL in problem for problem in verify_archive(path))
    with pytest.raises(DRTError, match=message):
        search(path, "index", everything(1))


@pytest.mark.parametrize("value", [-1, 99, 2**31 - 1])
def test_a_landmark_of_a_list_that_does_not_exist_is_refused(path: Path, value: int) -> None:
    """faiss does not look: it would write past the end of its lists."""
    (path / INDEX_FILE).write_bytes(forged(path, assignments=np.full(INDEXED * CHUNKS, value, np.int32)))
    with pytest.raises(DRTError, match="drt memory index"):
        search(path, "index", everything(1))


def test_centers_that_are_not_finite_are_refused(path: Path) -> None:
    (path / INDEX_FILE).write_bytes(forged(path, ranges=np.full((2, WIDTH), np.nan, np.float32)))
    assert any("finite" in problem for problem in verify_archive(path))
    with pytest.raises(DRTError, match="finite"):
        search(path, "index", everything(1))


def test_faiss_is_never_given_bytes_of_a_file(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own format names other files: it opens them for writing and maps them."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantizer, WIDTH, 1, faiss.METRIC_INNER_PRODUCT)
    landmarks = np.random.default_rng(0).standard_normal((INDEXED * CHUNKS, WIDTH)).astype(np.float32)
    index.train(landmarks)
    lists = faiss.OnDiskInvertedLists(1, index.code_size, str(tmp_path / "lists"))
    index.replace_invlists(lists)
    index.add(landmarks)
    content = faiss.serialize_index(index).tobytes().replace(b"lists", b"victi"[:5])
    with Archive.open(path) as opened:
        point = asdict(opened.point)
    for earlier in (content, bytes(4 * INDEXED * CHUNKS) + content):
        head = {"format": "drt-landmark-index", "format_version": 1, "point": point}
        head["crc32"] = _checksum(head, earlier)
        for line in (b"", json.dumps(head).encode() + b"\n"):
            (path / INDEX_FILE).write_bytes(line + earlier)
            for how in ("index", "auto"):
                if how == "auto" and line:  # of an earlier format: done without
                    assert_equal(search(path, how, everything(1)), search(path, "exact", everything(1)))
                    assert "every chunk is scored" in caplog.text
                    continue
                with pytest.raises(DRTError, match="make it anew with drt memory index"):
                    search(path, how, everything(1))
            assert any("make it anew with drt memory index" in problem for problem in verify_archive(path))
    assert victim.read_bytes() == b"precious"


def test_a_link_or_a_pipe_in_place_of_the_index(path: Path) -> None:
    for make in (lambda: (path / INDEX_FILE).symlink_to("/dev/zero"), lambda: os.mkfifo(path / INDEX_FILE)):
        (path / INDEX_FILE).unlink()
        make()
        assert any(f"{INDEX_FILE}: expected a regular file" in problem for problem in verify_archive(path))
        with pytest.raises(DRTError, match="expected a regular file"):
            search(path, "auto", everything(1))


def test_a_later_format_is_named(path: Path) -> None:
    line, _, body = (path / INDEX_FILE).read_bytes().partition(b"\n")
    head = json.dumps(json.loads(line) | {"format_version": 3}).encode()
    (path / INDEX_FILE).write_bytes(head + b"\n" + body)
    with pytest.raises(DRTError, match="format version 3, but this drt reads version 2"):
        search(path, "index", everything(1))


def test_a_full_disk_leaves_the_index_that_there_was(path: Path) -> None:
    before = (path / INDEX_FILE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with ArchiveWriter.open(path) as writer, pytest.raises(DRTError, match="File too large"):
            writer.index()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path / INDEX_FILE).read_bytes() == before
    ArchiveWriter.open(path).close()  # removes what was left half
    assert verify_archive(path) == []
    assert not list(path.glob("*.tmp"))


def test_an_unfinished_archive_is_not_indexed(path: Path) -> None:
    with ArchiveWriter.open(path) as writer:
        writer.begin_document("more")
        writer.store().append(*offer(0))
        writer.commit({}, finished=False)
        with pytest.raises(DRTError, match="finish its build before it is indexed"):
            writer.index()


def test_without_faiss_the_reason_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DRTError, match="a landmark index needs faiss: pip install faiss-cpu"):
        search(path, "index", everything(1))
    search(path, "auto", everything(1))
    assert verify_archive(path) == []
