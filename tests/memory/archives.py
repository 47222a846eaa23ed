"""Small archives without a model: the same text and chunks whenever they are made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drt.memory import ArchiveDescription, ArchiveWriter

SIZE, HEADS, DIM, WIDTH = 3, 2, 4, 5
CHUNKS = 4  # of a segment
DESCRIPTION = ArchiveDescription("small", "model", "tokenizer", SIZE, HEADS, DIM, WIDTH, 12)


def offer(segment: int) -> tuple[Tensor, ...]:
    """Keys, values, landmarks, lengths and new counts of a segment."""
    generator = torch.Generator().manual_seed(segment)
    keys, values = torch.randn(2, 1, CHUNKS, SIZE, HEADS, DIM, generator=generator)
    landmarks = torch.randn(1, CHUNKS, WIDTH, generator=generator)
    return keys, values, landmarks, torch.full((1, CHUNKS), SIZE), torch.tensor([CHUNKS])


def text(segment: int) -> bytes:
    """Of a segment."""
    return f"{segment:012d}".encode()


def write(path: Path, segments: int) -> None:
    """Make an archive, or go on with it, up to so many segments; every second one ends a document."""
    resumes = (path / "manifest.json").exists()
    with ArchiveWriter.open(path) if resumes else ArchiveWriter.create(path, DESCRIPTION) as writer:
        store = writer.store()
        for segment in range(writer.num_segments, segments):
            if segment % 2 == 0:
                writer.begin_document(f"document {segment // 2}")
            store.append(*offer(segment))
            start = 0 if segment % 2 == 0 else len(text(segment))
            writer.add_text(text(segment), np.arange(1, CHUNKS + 1) * SIZE + start)
            if segment % 2:
                writer.end_document()
            writer.commit({"at": torch.tensor([segment])}, finished=segment == segments - 1)


def tree(path: Path) -> dict[str, str]:
    """Digest of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
