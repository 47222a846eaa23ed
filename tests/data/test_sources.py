"""Documents out of every kind of source, and what is wrong with a damaged one."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from drt.data.sources import Document, Source, place_of, read_documents, read_sources, sample_texts
from drt.errors import DRTError

ROWS = [{"title": "one", "text": "Hä 1"}, {"title": "two", "text": "2"}]
DOCUMENTS = [Document("one", "Hä 1".encode()), Document("two", b"2")]


def read(path: Path | str, **fields: Any) -> list[Document]:
    return list(read_documents(Source(path=str(path), **fields)))


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_json_lines(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"books.jsonl{suffix}"
    path.write_bytes(pack("\n\n".join(json.dumps(row) for row in ROWS).encode()))
    assert read(path) == DOCUMENTS


def test_json_lines_in_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a\\ud83d"}\n{"body": " \\n"}\n{"body": "c", "id": 7}\n')
    assert read(path, text_field="body") == [Document(f"{path}:1", b"a?"), Document("7", b"c")]


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "x"}\r\n{"text": "y"}\r\n')
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + b"text"))
    assert [document.text for document in read(tmp_path / "a.jsonl")] == [b"x", b"y"]
    assert [document.text for document in read(tmp_path / "a.txt.gz")] == [b"text"]


def test_a_null_in_a_table_is_called_null(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "rows.parquet")
    with pytest.raises(DRTError, match=r"rows\.parquet:2: expected a text in the field 'text', got null"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("field", ["title", "name", "id", "path"])
def test_documents_of_one_name_do_not_fall_together(tmp_path: Path, field: str) -> None:
    for part in range(3):
        rows = (json.dumps({field: "c4", "text": f"document {part} {number}"}) for number in range(100))
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    sources = [Source(path=str(tmp_path / f"{part}.jsonl")) for part in range(3)]
    documents = [document for _, document in read_sources(sources)]
    places = [place_of(document.key) for document in documents]
    assert len(set(places)) == 300
    assert 60 < sum(place < 1 / 3 for place in places) < 140
    assert documents[0].key == "c4"  # as before there were namesakes
    backwards = [document.key for _, document in read_sources(sources[::-1])]
    assert len({document.key for document in documents[1:]} & set(backwards)) >= 298


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": row["text"], "title": row["title"], "score": 1.5} for row in ROWS] * 100
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == DOCUMENTS * 100


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hä 1")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"2"))
    assert read(tmp_path / "a.txt") == [Document("a.txt", "Hä 1".encode())]
    assert read(tmp_path / "b.txt.xz") == [Document("b.txt.xz", b"2")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    files = {
        "b.c": b"bee",
        "a.h": b"ay",
        "net/x.c": b"ex",
        "net/binary": b"\0",
        "net/latin1": b"\xe9",
        "net/.hidden": b"no",
        ".git/x": b"no",
        "net/core/y.c": b"why",
        "empty/z": b"",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "net" / "link").symlink_to(folder / "b.c")
    return folder


def test_files_of_a_folder(folder: Path) -> None:
    assert read(folder) == [
        Document("source/a.h", b"ay"),
        Document("source/b.c", b"bee"),
        Document("source/net/x.c", b"ex"),
        Document("source/net/core/y.c", b"why"),
    ]


def test_rows_of_files_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    (folder / "0.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "1.jsonl").write_bytes(lines)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "2.parquet")
    (folder / "3.json").write_text('{"setting": 1}')
    assert read(folder) == DOCUMENTS * 3 + [Document("shards/3.json", b'{"setting": 1}')]


def test_directories_of_a_folder(folder: Path) -> None:
    assert read(folder, documents="directories") == [
        Document("source", b"ay\nbee"),
        Document("source/net", b"ex"),
        Document("source/net/core", b"why"),
    ]
    with pytest.raises(DRTError, match="expected files or directories, got 'dirs'"):
        read(folder, documents="dirs")


def test_a_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, configuration, split, streaming))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hf:someone/pg19@train") == DOCUMENTS
    assert read("hf:someone/arxiv:small@test") == DOCUMENTS
    assert asked == [("someone/pg19", None, "train", True), ("someone/arxiv", "small", "test", True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "whole"}\n{"tex', "a.jsonl:2: expected JSON lines"),
        ("a.jsonl", b"[" * 10**6, "a.jsonl:1: expected JSON lines, .*nested too deeply"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl is not UTF-8 text: .*Latin-1"),
        (
            "a.jsonl.xz",
            lzma.compress(b'{"text": "x"}\n' * 1000)[:-20],
            "a.jsonl.xz: expected a whole .xz file, but it is damaged",
        ),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: expected a whole .gz file, but it is damaged"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"a.jsonl:1: expected a text in the field 'text', got other fields: 'body', 'id'",
        ),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1: expected a text in the field 'text', got null"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"a.jsonl:1: expected a text in the field 'text', got a list"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: expected a JSON object, got a list"),
        ("a.parquet", b"no table", "a.parquet: expected a Parquet file"),
        ("a.txt", b"\0", "a.txt is not UTF-8 text"),
    ],
)
def test_damaged_sources_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DRTError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["nothing.jsonl", "hf:name", "hf:@train"])
def test_missing_sources_are_named(path: str) -> None:
    with pytest.raises(DRTError, match=f"{path}: (no such file or folder|expected hf:NAME@SPLIT)"):
        read(path)


def test_a_data_set_that_is_not_to_be_had_is_named() -> None:
    with pytest.raises(DRTError, match="hf:nobody/nothing@train: the data set cannot be read"):
        read("hf:nobody/nothing@train")


def test_samples(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"d{number}", "text": "x" * 10}) + "\n" for number in range(200))
    )
    source = Source(path=str(path))
    assert len(sample_texts([source], 35)) == 4
    assert len(sample_texts([source], 10**6)) == 200
    assert 40 < len(sample_texts([source], 10**6, 0.3)) < 80
    with pytest.raises(DRTError, match="hold no text"):
        sample_texts([source], 0)
