"""An archive of a very long text: how fast it is built, what it takes on disk and in memory, how soon it answers.

    python benchmarks/memory.py TEXT... --lengths 1M,16M,64M --json memory.jsonl

For each length: the texts, repeated, with needles at five depths, are read into an archive by one process; for each
needle another process opens the archive and asks. Ready seconds (imports and loading the model) are not part of answer
seconds (opening the archive and generating).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    """Parse, measure each length, show a table."""
    from drt.data.needles import parse_length

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 files; repeated where a length wants more")
    parser.add_argument("--lengths", default="1M,16M", help="tokens of each archive")
    parser.add_argument("--checkpoint", type=Path, help="folder of the model; default: the one that ships")
    parser.add_argument("--dtype", default="bfloat16", help="of keys and values")
    parser.add_argument(
        "--folder", type=Path, help="where the archives are made; default: a temporary folder"
    )
    parser.add_argument("--json", type=Path, help="append the records to this file")
    options = parser.parse_args()
    table = Table(title="Archives")
    for name in ("tokens", "tokens/s", "build RAM", "bytes/token", "found", "answer s", "ask RAM"):
        table.add_column(name, justify="right")
    for length in map(parse_length, options.lengths.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            record = measure(Path(folder), length, options)
        print(json.dumps(record), flush=True)
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        table.add_row(
            f"{length:,}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['build_peak_rss_bytes'] / 1e6:,.0f} MB",
            f"{record['bytes_per_token']:.1f}",
            f"{record['found']}/{len(DEPTHS)}",
            f"{max(record['answer_seconds']):.2f}",
            f"{record['ask_peak_rss_bytes'] / 1e6:,.0f} MB",
        )
    Console().print(table)


def measure(folder: Path, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Build an archive of ``length`` tokens in one process, ask of it in others."""
    text, archive = folder / "text.txt", folder / "archive"
    needles = write_text(text, options.texts, length)
    checkpoint = "" if options.checkpoint is None else str(options.checkpoint)
    built = run("build", str(text), str(archive), checkpoint, options.dtype)
    text.unlink()
    asked = [run("ask", str(archive), checkpoint, f"|{name}?", "5") for name in needles]
    sizes = {file.name: file.stat().st_size for file in archive.iterdir()}
    shutil.rmtree(archive)
    return {
        "benchmark": "memory",
        "length": length,
        "dtype": options.dtype,
        **built,
        "bytes_per_token": sum(sizes.values()) / length,
        "bytes": sizes,
        "found": sum(one["answer"] == value for one, value in zip(asked, needles.values(), strict=True)),
        "answers": [one["answer"] for one in asked],
        "answer_seconds": [one["answer_seconds"] for one in asked],
        "ready_seconds": [one["ready_seconds"] for one in asked],
        "ask_peak_rss_bytes": max(one["peak_rss_bytes"] for one in asked),
    }


def write_text(path: Path, sources: list[Path], length: int) -> dict[str, str]:
    """A text of ``length`` bytes with a needle at each depth; returns their values by name."""
    from drt.data.formats import NamePool, fact, name_uses

    source = b"\n\n".join(source.read_bytes() for source in sources)
    rng = np.random.default_rng(0)
    pool = NamePool(rng, name_uses(source))
    needles = {pool.draw(): f"{rng.integers(10**5):05d}" for _ in DEPTHS}
    written = 0
    with path.open("wb") as file:
        for depth, (name, value) in zip(DEPTHS, needles.items(), strict=True):
            written += fill(file, source, written, round(depth * length))
            written += file.write(fact(name, int(value)).needles[0].encode())
        fill(file, source, written, length)
    return needles


def fill(file: Any, source: bytes, written: int, wanted: int) -> int:
    """Repeat a text until ``wanted`` bytes are written; returns how many were added."""
    added = 0
    while written + added < wanted:
        place = (written + added) % len(source)
        added += file.write(source[place : place + wanted - written - added])
    return added


def run(*arguments: str) -> dict[str, Any]:
    """One step in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", *arguments], check=True, stdout=subprocess.PIPE
    )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def build(text: str, archive: str, checkpoint: str, dtype: str) -> dict[str, Any]:
    """Read a text into an archive."""
    from drt.machine import keep_freed_memory, peak_rss_bytes
    from drt.memory import ArchiveWriter
    from drt.models.drt.archive_drt import describe_archive, read_documents
    from drt.models.loading import load_model, shipped_checkpoint

    keep_freed_memory()  # as `drt memory build` does
    model, tokenizer = load_model(checkpoint or shipped_checkpoint())
    description = describe_archive(model, tokenizer, model_name="benchmark", dtype=dtype)  # type: ignore[arg-type]
    start = time.perf_counter()
    with ArchiveWriter.create(archive, description) as writer:
        read_documents(model, tokenizer, writer, [text])  # type: ignore[arg-type]
        tokens = writer.num_tokens
    seconds = time.perf_counter() - start
    return {
        "build_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "build_peak_rss_bytes": peak_rss_bytes(),
    }


def ask(archive: str, checkpoint: str, question: str, max_new_tokens: str) -> dict[str, Any]:
    """Ask an archive one question."""
    start = time.perf_counter()
    import torch

    from drt.data.tokens import TextCodec
    from drt.machine import peak_rss_bytes
    from drt.models.drt import DRTCache
    from drt.models.loading import load_model, shipped_checkpoint

    model, tokenizer = load_model(checkpoint or shipped_checkpoint())
    codec = TextCodec(tokenizer)
    ready = time.perf_counter()
    ids = torch.from_numpy(codec.encode(question)).long()[None]
    cache = DRTCache.open(archive, model)
    answer = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=int(max_new_tokens),
        do_sample=False,
    )
    return {
        "answer": codec.decode(answer[0, ids.shape[1] :].tolist()).decode(errors="replace"),
        "ready_seconds": ready - start,
        "answer_seconds": time.perf_counter() - ready,
        "peak_rss_bytes": peak_rss_bytes(),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step = {"build": build, "ask": ask}[sys.argv[2]]
        print(json.dumps(step(*sys.argv[3:])))
    else:
        main()
