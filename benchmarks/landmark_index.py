"""The landmarks of a long archive: scored one by one, or by an index of faiss. Where does an index begin to pay?

    python benchmarks/landmark_index.py TEXT... --folder ARCHIVE --sizes 100K,1M,2M --json landmark_index.jsonl

The texts, with needles at even depths, are read into an archive by the model that ships; a stopped run goes on, and an
archive that is there is used as it is. Indexes are made of its first landmarks, as many as each size says, and asked
with the queries that the model makes of needle questions and of the chunks of a text. A size beyond what the archive
holds is filled with copies of its landmarks, each turned by as much as neighbours differ; what a needle's question
finds is not copied.

- build s, bytes: to make an index, and to keep it.
- first ms: of a new reader's first query: what is searched is read (from the system's cache of files) and checked.
- query ms: of one query from then on, the ranking of its candidates included.
- pass ms: of what is asked in a pass that reads 4,096 tokens: the queries of the chunks at its end, by each group. The
  first record tells what the pass takes without.
- recall: of the 8 best landmarks by exact scores, how many are found, by the needles' queries and by the text's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Report, lengths, now, parser, seconds
from torch import Tensor

from drt.data.formats import NamePool, fact, name_uses
from drt.data.tokens import TextCodec
from drt.memory import Archive, ArchiveWriter, LandmarkIndex
from drt.memory.approximate_index import (
    INDEX_FILE,
    ApproximateIndex,
    IndexArrays,
    build_index,
    dump_index,
    load_index,
    training_size,
)
from drt.memory.archive import JOURNAL, MANIFEST, read_journal
from drt.memory.archive_files import ArchiveFiles, ArchivePage
from drt.memory.landmark_index import PlacedPage
from drt.memory.manifest import Manifest, Point
from drt.models.drt import DRTCache
from drt.models.drt.archive_drt import describe_archive, read_documents
from drt.models.loading import load_model, shipped_checkpoint
from drt.ops.chunk_retrieval import select_chunks

TOP_K = 8
NEEDLES = 100
ASKING = 2**13  # tokens of the text whose chunks ask
TOKENS_A_CHUNK = 31  # of the shipped model
PASS = 4096  # tokens
ASKED_A_PASS, GROUPS = (
    4,
    2,
)  # chunks at the end of a pass that the upper decoder runs over, and who asks there
EXACT = ("exact", "exact, in memory")
TURN = 0.018  # radians between a landmark and the nearest other: the median of 10,000 of English text
COPIED_AT_ONCE = 2**13
INDEXED = "IVF, 8 bits"


class Queries(NamedTuple):
    """Queries (1, n, H) of needle questions, and of the chunks of a text."""

    needle: Tensor
    text: Tensor


def main() -> None:
    """Parse, read the texts, measure every size, show a table."""
    options = parser(__doc__)
    options.add_argument("texts", nargs="+", type=Path, help="UTF-8 files")
    options.add_argument("--folder", type=Path, required=True, help="where the archive is, or is made")
    options.add_argument("--sizes", type=lengths, default="100K,1M", help="landmarks (default: %(default)s)")
    arguments = options.parse_args()
    report = Report("landmark_index", arguments)
    model, tokenizer = load_model(shipped_checkpoint())
    names = build_archive(model, tokenizer, arguments.texts, arguments.folder)
    with Archive.open(arguments.folder) as archive:
        queries = make_queries(model, TextCodec(tokenizer), archive, names, arguments.texts[0])
        held = archive.num_chunks
    report.add(search="reading alone", length=PASS, pass_ms=1e3 * reading_seconds(model, arguments.repeats))
    for size in arguments.sizes:
        folder = arguments.folder if size <= held else enlarge(arguments.folder, held, size, queries)
        measure(report, arguments, folder, size, queries)
    report.finish("length", "search", {"query_ms": "ms for a query", "first_ms": "ms for the first query"})


def build_archive(model: Any, tokenizer: Any, texts: list[Path], folder: Path) -> list[str]:
    """Read the texts, with needles in them, into an archive that is not there yet; returns the needles' names."""
    text = b"\n\n".join(path.read_bytes() for path in texts)
    rng = np.random.default_rng(0)
    pool = NamePool(rng, name_uses(text))
    names = [pool.draw() for _ in range(NEEDLES)]
    source = folder.with_suffix(".txt")
    if not source.exists():
        places = [round(number * len(text) / NEEDLES) for number in range(NEEDLES + 1)]
        parts = [text[first:last] for first, last in pairwise(places)]
        needles = [fact(name, int(rng.integers(10**5))).needles[0].encode() for name in names]
        source.write_bytes(b"".join(piece for pair in zip(needles, parts, strict=True) for piece in pair))
    description = describe_archive(model, tokenizer, model_name="benchmark")
    begun = (folder / MANIFEST).exists()
    with ArchiveWriter.open(folder) if begun else ArchiveWriter.create(folder, description) as writer:
        if not writer.finished:
            read_documents(model, tokenizer, writer, [source])
    return names


@torch.no_grad()
def make_queries(model: Any, codec: TextCodec, archive: Archive, names: list[str], text: Path) -> Queries:
    """What both groups ask at the end of each needle's question to the archive, and at the end of a text's chunks."""
    asked: list[Tensor] = []
    handles = [
        retriever.norm.register_forward_hook(lambda module, given, query: asked.append(query[0]))
        for retriever in model.model.retrievers
    ]
    archive.search = "exact"
    for name in names:
        question = torch.from_numpy(codec.encode(f"|{name}?")).long()[None]
        ends = torch.zeros(question.shape, dtype=torch.bool)
        ends[0, -1] = True
        model(question, past_key_values=DRTCache.open(archive, model), chunk_ends=ends)
    needle = torch.cat(asked)[None]
    asked.clear()
    model(torch.from_numpy(codec.encode(text.read_bytes()[-ASKING:])).long()[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return Queries(needle, torch.cat(asked)[None])


def reading_seconds(model: Any, repeats: int) -> float:
    """To read a pass of tokens into a memory, without a search."""
    ids = torch.randint(3, 256, (1, PASS), generator=torch.Generator().manual_seed(0))
    return seconds({"pass": lambda: model.model.remember(ids, DRTCache(model.config))}, repeats)["pass"]


def enlarge(folder: Path, held: int, size: int, queries: Queries) -> Path:
    """An archive of landmarks alone: those of another, then copies, turned a little."""
    target = folder.with_name(f"{folder.name}-{size}")
    if (target / MANIFEST).exists():
        return target
    source = landmarks(folder, held)
    real = torch.cat([block[0] for _, block in source.blocks(0)])
    plain = torch.ones(held, dtype=torch.bool)
    plain[select(source, queries.needle).flatten()] = False
    copied = plain.nonzero().flatten()
    description = Manifest.load(folder / MANIFEST).description
    description = replace(description, chunk_size=1, num_heads=1, head_dim=1)
    generator = torch.Generator().manual_seed(0)
    with ArchiveWriter.create(target, description) as writer:
        writer.begin_document("landmarks")
        store = writer.store()
        for first in range(0, size, COPIED_AT_ONCE):
            number = torch.arange(first, min(first + COPIED_AT_ONCE, size))
            block = torch.empty(len(number), real.shape[1])
            block[number < held] = real[number[number < held]]
            copies = real[copied[number[number >= held] % len(copied)]]
            turn = torch.randn(copies.shape, generator=generator) * copies.norm(dim=1, keepdim=True)
            block[number >= held] = copies + TURN / real.shape[1] ** 0.5 * turn
            nothing, lengths = torch.zeros(1, len(number), 1, 1, 1), torch.ones(1, len(number)).long()
            store.append(nothing, nothing, block[None], lengths, torch.tensor([len(number)]))
            writer.commit({}, finished=number[-1] == size - 1)
    return target


def measure(report: Report, options: argparse.Namespace, archive: Path, size: int, queries: Queries) -> None:
    """Search the first landmarks of an archive exactly, then by an index."""
    one, some = queries.needle[:, :1], queries.needle[:, :ASKED_A_PASS]
    exact = [select(landmarks(archive, size), query) for query in queries]
    for name in (*EXACT, INDEXED):
        record: dict[str, Any] = {"search": name, "chunks": size, "length": size * TOKENS_A_CHUNK}
        searched: LandmarkIndex | Tensor
        if name == EXACT[1]:
            searched = torch.cat([block for _, block in landmarks(archive, size).blocks(0)], 1)
        else:
            with TemporaryDirectory() as folder:
                if name == INDEXED:
                    start = now()
                    arrays = build(archive, size)
                    record["build_seconds"] = now() - start
                    content = dump_index(Point(chunks=size), arrays)
                    record["bytes"] = Path(folder, INDEX_FILE).write_bytes(content)
                    del arrays, content
                start = now()
                width = queries.needle.shape[-1]
                held = load_index(Path(folder), width, verify=True) if name == INDEXED else None
                searched = landmarks(archive, size, held)
                select(searched, one)
                record["first_ms"] = 1e3 * (now() - start)
        asking = {
            "query_ms": lambda searched=searched: select(searched, one),
            "pass_ms": lambda searched=searched: [select(searched, some) for _ in range(GROUPS)],
        }
        record |= {what: 1e3 * value for what, value in seconds(asking, options.repeats).items()}
        for which, query, best in zip(Queries._fields, queries, exact, strict=True):
            record[f"recall_{which}"] = recall(select(searched, query), best)
        report.add(**record)


def landmarks(folder: Path, size: int, index: ApproximateIndex | None = None) -> LandmarkIndex:
    """The first landmarks of an archive, as a reader that has just opened it searches them."""
    manifest = Manifest.load(folder / MANIFEST)
    files = ArchiveFiles(folder, manifest.description, writable=False, verify=True)
    for segment in read_journal(folder / JOURNAL, manifest.head, verify=True):
        files.add(segment)
    page = PlacedPage(ArchivePage(files, size, index), 0)
    return LandmarkIndex([page], torch.tensor([size]), index)


def build(folder: Path, size: int) -> IndexArrays:
    """An index of the first landmarks of an archive."""
    source = landmarks(folder, size)
    sample = torch.arange(training_size(size)) * size // training_size(size)
    blocks = (block[0] for _, block in source.blocks(0))
    return build_index(source.read(sample[None, None])[0, 0], size, blocks)


def select(source: LandmarkIndex | Tensor, query: Tensor) -> Tensor:
    """The best chunks (n, K) for queries (1, n, H) that see all."""
    held = source.shape[1] if isinstance(source, Tensor) else source.num_landmarks
    visible = torch.full(query.shape[:2], held)
    return select_chunks(query, source, visible, top_k=TOP_K)[0]


def recall(found: Tensor, best: Tensor) -> float:
    """The share of the best (n, K) that are among those found (n, K)."""
    return float((found.unsqueeze(-1) == best.unsqueeze(-2)).any(-2).float().mean())


if __name__ == "__main__":
    main()
