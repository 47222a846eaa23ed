"""Haystacks: every kind of file that is read, every kind that is refused, and random windows of their text."""

from __future__ import annotations

import gzip
import lzma
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drt.data.haystack import Haystack, load_haystack, sample_haystack
from drt.data.tokens import TextCodec
from drt.errors import DRTError

TEXT = "Die Bücher: 一頁 😀 naïve.\n".encode()


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.txt.xz", lzma.compress), ("a.gz", gzip.compress), ("a", bytes)]
)
def test_a_file_is_read_plain_or_compressed(tmp_path: Path, name: str, pack: Any) -> None:
    path = tmp_path / name
    path.write_bytes(pack(TEXT))
    assert load_haystack([path]) == Haystack(TEXT, (str(path),))


def test_texts_follow_one_another_in_the_order_given(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 3)
    assert load_haystack([tmp_path / "b", str(tmp_path / "a")]).text == b"bbb\n\naaa"


def test_of_a_folder_every_text_is_taken_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b.py", "sub/c.txt", ".git/config", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("Bücher".encode("latin-1"))
    (tmp_path / "nothing.txt").touch()
    found = load_haystack([tmp_path])
    assert found.text == b"b.py\n\nsub/c.txt\n\nz.txt"
    assert found.names == (str(tmp_path),)


@pytest.mark.parametrize("paths", [None, []])
def test_without_a_path_it_is_the_sample(paths: Any) -> None:
    assert load_haystack(paths).names == ("sample",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", " is empty"),
        ("a.xz", lzma.compress(b""), " is empty"),
        ("a.bin", b"text\0and more", " is not UTF-8 text: .*binary"),
        (
            "a.txt",
            "Bücher".encode("latin-1"),
            " is not UTF-8 text: .* at byte 1; .*Latin-1.*iconv -f WINDOWS-1252",
        ),
        ("a.txt", TEXT.decode().encode("utf-16"), " is not UTF-8 text: .*iconv -f UTF-16"),
        ("a.txt", b"%PDF-1.7\n\xe2\xe3\xcf\xd3", " is not UTF-8 text: .*a PDF"),
        ("a.txt", lzma.compress(TEXT), " is not UTF-8 text: .*xz"),
        ("a.docx", b"PK\x03\x04\x14\0\x06\0", " is not UTF-8 text: .*ZIP.*pandoc"),
        ("a.gz", gzip.compress(b"text\0", mtime=0), " is not UTF-8 text: .*binary"),
        ("a.xz", lzma.compress(TEXT)[:-5], r": expected a whole \.xz file, but it is damaged"),
        ("a.xz", TEXT, r": expected a whole \.xz file, but it is damaged"),
        ("a.xz", b"", r": expected a whole \.xz file, but it is damaged"),
        ("a.gz", gzip.compress(TEXT, mtime=0)[:-9], r": expected a whole \.gz file, but it is damaged"),
        (
            "a.gz",
            gzip.compress(TEXT, mtime=0)[:12] + b"\xff" * 30,
            r": expected a whole \.gz file, but it is damaged",
        ),
        ("a.gz", TEXT, r": expected a whole \.gz file, .*Not a gzipped file"),
        (
            "a.gz",
            gzip.compress(TEXT, mtime=0)[:-8] + bytes(8),
            r": expected a whole \.gz file, .*CRC check failed",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DRTError, match=re.escape(str(path)) + message):
        load_haystack([path])


def test_a_path_to_nothing_says_how_to_get_a_text(tmp_path: Path) -> None:
    with pytest.raises(DRTError, match=r"nothing\.txt: no such file or folder.*drt data haystack"):
        load_haystack([tmp_path / "nothing.txt"])


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DRTError, match="expected a folder with text files in it, got none"):
        load_haystack([tmp_path])


@pytest.mark.parametrize("tokens", [1, 2, 37, 500])
def test_a_window_is_a_contiguous_piece(tokenizer: Any, tokens: int) -> None:
    codec = TextCodec(tokenizer)
    haystack = Haystack(TEXT * 100)
    for seed in range(30):
        ids, text = haystack.window(codec, tokens, np.random.default_rng(seed))
        assert ids.shape == (tokens,)
        assert text in haystack.text
        np.testing.assert_array_equal(codec.encode(text)[:tokens], ids)
        assert codec.decode(ids)[:-4] in text  # a BPE token may end inside a character


def test_a_window_begins_with_a_whole_character(byte_tokenizer: Any) -> None:
    haystack = Haystack("é😀".encode() * 50)
    firsts = {
        haystack.window(TextCodec(byte_tokenizer), 20, np.random.default_rng(i))[1][0] for i in range(60)
    }
    assert firsts == {"é".encode()[0], "😀".encode()[0]}


def test_windows_reach_both_ends_and_everything_between(byte_tokenizer: Any) -> None:
    haystack = Haystack(bytes(range(ord("0"), ord("z"))))
    codec = TextCodec(byte_tokenizer)
    windows = {haystack.window(codec, 70, np.random.default_rng(seed))[1] for seed in range(100)}
    assert windows == {haystack.text[start : start + 70] for start in range(len(haystack.text) - 69)}


def test_the_whole_text_is_a_window(tokenizer: Any) -> None:
    codec = TextCodec(tokenizer)
    haystack = Haystack(TEXT * 20, ("one", "two"))
    count = len(codec.encode(haystack.text))
    ids, _ = haystack.window(codec, count, np.random.default_rng(0))
    assert codec.decode(ids) == haystack.text
    with pytest.raises(
        DRTError, match=rf"\(one, two\) is too short: expected {count + 1} tokens .* got {count}"
    ):
        haystack.window(codec, count + 1, np.random.default_rng(0))


def test_only_about_as_much_text_is_tokenised_as_is_needed(bpe_tokenizer: Any, books: Haystack) -> None:
    ids, text = books.window(TextCodec(bpe_tokenizer), 1000, np.random.default_rng(0))
    assert len(text) < 8 * len(ids)


def test_the_sample_is_the_text_that_its_readme_describes() -> None:
    text = sample_haystack().text
    readme = files("drt.data").joinpath("sample", "README.md").read_text(encoding="utf-8")
    assert f"({len(text):,} bytes)" in readme
    assert len(text) > 2**20 + 2**16  # a million tokens with room to choose from
    assert text.isascii()
    titles = re.findall(r"^\| (?!title|-)([^|]+?) +\|", readme, re.MULTILINE)
    assert len(titles) == 4
    lines = [line for line in text.decode().splitlines() if line]
    assert len(set(lines)) > 0.95 * len(lines)  # prose, not a piece repeated
    assert all(word in text for word in (b"Toad", b"Archer", b"Ethan", b"Otranto"))


def test_repr_does_not_show_the_text() -> None:
    assert repr(Haystack(TEXT, ("a",))) == "Haystack(names=('a',))"
