"""Files that people have, as text: what is read, what is refused, and what it says."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from drt.data import text_files
from drt.data.text_files import folder_texts, read_text, text_blocks, text_lines
from drt.data.text_files import text_files as list_texts
from drt.errors import DRTError

HTML = """<html><head><title>no</title><style>p {}</style><script>no()</script></head>
<body><h1>Café</h1><p>One <b>bold</b> word.</p></body></html>"""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_blocks_are_the_text_and_may_begin_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
    text = "Bücher\n一頁 😀\n\nend".encode()
    for name, content in (
        ("a", text),
        ("marked", b"\xef\xbb\xbf" + text),
        ("a.gz", gzip.compress(text)),
        ("a.XZ", lzma.compress(text)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert read_text(path) == text
        assert list(text_lines(path)) == text.split(b"\n")
        for skip in range(len(text) + 1):
            assert b"".join(text_blocks(path, skip)) == text[skip:]


def test_only_regular_files_are_read_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert read_text(tmp_path / "link.txt") == b"text"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, kind in (("pipe", "a pipe"), ("zero", "a device"), (".", "a folder"), ("lost", "No such file")):
        with pytest.raises(DRTError, match=kind):
            read_text(tmp_path / name)


def test_a_folder_tells_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in {
        "b/c.txt": b"c",
        "b/picture.png": b"\x89PNG\0",
        "a.txt.gz": gzip.compress(b"a"),
        "latin.txt": b"caf\xe9",
        "empty": b"",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    found = dict(folder_texts(tmp_path, read_text))
    assert found == {tmp_path / "a.txt.gz": b"a", tmp_path / "b" / "c.txt": b"c"}
    assert list_texts([tmp_path]) == dict.fromkeys(found, 1)
    told = "\n".join(caplog.messages)
    for name in ("b/picture.png", "latin.txt", "zero", "pipe"):
        assert name in told
    assert "hidden" not in told


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DRTError, match="closed: cannot be read: Permission denied"):
        list(folder_texts(tmp_path, read_text))


def test_a_damaged_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(DRTError, match=r"a\.txt\.gz: expected a whole \.gz file"):
        list_texts([tmp_path])


def test_files_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DRTError, match=r"a\.txt is named twice"):
        list_texts([tmp_path / "a.txt", tmp_path])


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_bomb_is_refused_before_it_expands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, pack: Any
) -> None:
    monkeypatch.setattr(text_files, "_FREE_BYTES", 2**21)
    path = tmp_path / f"bomb.txt{suffix}"
    path.write_bytes(pack(b"a" * 2**24))
    with pytest.raises(DRTError, match=r"bomb\.txt\..z: expands to more than 200 times"):
        read_text(path)
    path.write_bytes(pack(b"a" * 2**20))
    assert len(read_text(path)) == 2**20


def test_html_is_read_as_a_browser_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("inscriptis")
    declared = HTML.replace("<head>", '<head><meta charset="iso-8859-1">')
    for name, content in (("a.html", HTML.encode()), ("b.htm", declared.encode("latin-1"))):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name).decode().split() == ["Café", "One", "bold", "word."]
    (tmp_path / "c.html.gz").write_bytes(gzip.compress(HTML.encode()))
    assert read_text(tmp_path / "c.html.gz") == read_text(tmp_path / "a.html")


def pdf(text: str) -> bytes:
    """A page that shows a line."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    file, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(file))
        file += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    end = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % len(file)
    return file + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def test_a_pdf_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("A page of text"))
    assert read_text(path).strip() == b"A page of text"
    path.write_bytes(pdf(""))
    with pytest.raises(DRTError, match=r"a\.pdf: .*ocrmypdf"):
        read_text(path)
    for content in (b"", b"hello", pdf("x")[:60]):
        path.write_bytes(content)
        with pytest.raises(DRTError, match=r"a\.pdf"):
            read_text(path)


@pytest.mark.parametrize(("name", "module"), [("a.html", "inscriptis"), ("a.pdf", "pypdf")])
def test_without_the_extra_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"<p>text")
    with pytest.raises(DRTError, match=rf"{name}: .*pip install \"drt-lm\[documents\]\""):
        read_text(tmp_path / name)
