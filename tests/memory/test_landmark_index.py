"""Searching landmarks that lie on disk: block by block, as far as is looked, with the result of a search in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from archives import CHUNKS, DESCRIPTION, WIDTH, offer

from drt.memory import Archive, ArchiveWriter, archive_files
from drt.memory.archive_files import ArchivePage
from drt.ops.chunk_retrieval import retrieve_chunks

SEGMENTS = 10


@pytest.fixture(params=["float32", "bfloat16"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of one document whose landmarks are searched two segments at a time."""
    monkeypatch.setattr(archive_files, "LANDMARK_BLOCK", 2 * CHUNKS)
    description = replace(DESCRIPTION, landmark_dtype=request.param)
    with ArchiveWriter.create(tmp_path / "archive", description) as writer:
        store = writer.store()
        writer.begin_document("one")
        for segment in range(SEGMENTS):
            store.append(*offer(segment))
            writer.commit({}, finished=segment == SEGMENTS - 1)
    return tmp_path / "archive"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_search_on_disk_finds_what_one_in_memory_does(path: Path, rows: int) -> None:
    """Also with chunks appended in memory behind those of the archive, and with two questions' rows of one archive."""
    with Archive.open(path) as archive:
        store = archive.store()
        store.select_rows(torch.zeros(rows, dtype=torch.long))
        new = [x.expand(rows, *x.shape[1:]) for x in offer(99)]
        store.append(*new[:4], torch.full((rows,), CHUNKS))
        held = [offer(segment)[2] for segment in range(SEGMENTS)]
        dtype = getattr(torch, archive.description.landmark_dtype)
        landmarks = torch.cat([*[x.to(dtype).float() for x in held], offer(99)[2]], 1).expand(rows, -1, -1)
        query = torch.randn(rows, 6, WIDTH)
        visible = torch.tensor([0, 1, 7, 20, 40, 44]).expand(rows, -1)
        blocks = store.landmark_blocks()
        assert len(blocks) == SEGMENTS // 2 + 1
        found = retrieve_chunks(query, blocks, visible, top_k=3)
        expected = retrieve_chunks(query, landmarks, visible, top_k=3)
        assert torch.equal(found.chunk_indices, expected.chunk_indices)
        torch.testing.assert_close(found.chunk_weights, expected.chunk_weights)


def test_weights_are_computed_in_float32_of_landmarks_as_they_are_held(path: Path) -> None:
    """Whatever they are held in; 16 bits would be a thousand times less exact."""
    query = torch.randn(1, 6, WIDTH)
    with Archive.open(path) as archive:
        blocks = archive.store().landmark_blocks()
        found = retrieve_chunks(query, blocks, torch.full((1, 6), SEGMENTS * CHUNKS), top_k=3)
        held = blocks.read(found.chunk_indices)
    assert held.dtype == getattr(torch, archive.description.landmark_dtype)
    scores = (query.unsqueeze(-2).double() * held.double()).sum(-1) * WIDTH**-0.5
    torch.testing.assert_close(found.scores.double(), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.chunk_weights.double(), scores.softmax(-1), rtol=1e-5, atol=1e-6)


def test_no_block_is_read_that_no_query_sees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    landmarks = ArchivePage.landmarks

    def recorded(page: ArchivePage, first: int, last: int) -> torch.Tensor:
        read.append((first, last))
        return landmarks(page, first, last)

    monkeypatch.setattr(ArchivePage, "landmarks", recorded)
    with Archive.open(path) as archive:
        blocks = archive.store().landmark_blocks()
        assert read == []
        retrieve_chunks(torch.randn(1, 1, WIDTH), blocks, torch.tensor([[2 * CHUNKS]]), top_k=2)
    assert read == [(0, 2 * CHUNKS)]
