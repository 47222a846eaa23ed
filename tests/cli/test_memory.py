"""`drt memory`: what is kept, going on after a stop, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from drt.data import text_files
from drt.memory import Archive, ArchiveWriter
from drt.models.drt import DRTConfig, DRTForCausalLM, archive_drt

Run = Callable[..., Any]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def facts(drt: Run, folder: object) -> dict[str, Any]:
    result = drt("memory", "info", folder, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("another text, not long")
    return path


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the next reading end with Ctrl-C after so many passes; it commits after each."""
    read = archive_drt.read_documents

    def install(passes: int) -> None:
        left = [passes]

        def count(tokens: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        def stopped(*arguments: Any) -> None:
            monkeypatch.setattr(archive_drt, "read_documents", read)
            read(*arguments[:4], count, commit_tokens=1)

        monkeypatch.setattr(archive_drt, "read_documents", stopped)

    return install


def test_what_is_built_is_told_and_whole(
    drt: Run, build: Run, book: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(book.parent)  # short names, which a table does not break
    size = book.stat().st_size
    assert f"m: {size + 22:,} tokens of 2 documents in" in build(book.name, other.name, "-o", "m").stdout
    known = facts(drt, "m")
    assert [(one["name"], one["num_tokens"]) for one in known["documents"]] == [
        (book.name, size),
        (other.name, 22),
    ]
    assert known["tokens"] == size + 22
    assert known["bytes"] == sum(known["files"].values())
    assert known["unfinished"] is False
    assert known["description"]["dtype"] == "bfloat16"
    shown = drt("memory", "info", "m").stdout
    for part in ("1,022 tokens in", "other.txt", "bytes a token, in bfloat16"):
        assert part in shown
    verified = drt("memory", "verify", "m")
    assert (verified.exit_code, verified.stdout) == (0, "m is whole\n")


def test_the_same_build_again_changes_nothing(build: Run, book: Path) -> None:
    build(book, "-o", "m")
    before = content(Path("m"))
    assert "m is complete: " in build(book, "-o", "m").stdout
    assert content(Path("m")) == before


def test_ctrl_c_leaves_an_archive_that_the_same_command_completes(
    drt: Run, build: Run, refuses: Run, checkpoint: Path, book: Path, stop_after: Callable[[int], None]
) -> None:
    options = ("--segment-size", "60", "-o")
    command = ("memory", "build", "--checkpoint", checkpoint, "--device", "cpu", book, *options)
    stop_after(4)
    result = drt(*command, "m")
    assert result.exit_code == 130, result.output
    assert "m keeps 240 tokens of 1 document" in result.stderr
    assert "Run the same command again to resume." in result.stderr
    assert "is not finished" in refuses("memory", "info", "m")
    verified = drt("memory", "verify", "m")
    assert (verified.exit_code, verified.stdout.count("\n")) == (1, 1)
    assert "240 tokens are committed" in verified.stdout
    build(book, *options, "m")
    build(book, *options, "whole")
    assert drt("memory", "verify", "m").exit_code == 0
    for name in ("chunks.bin", "landmarks.bin", "text.bin", "index.bin"):
        assert Path("m", name).read_bytes() == Path("whole", name).read_bytes()


def test_append_adds_documents_once(
    drt: Run,
    build: Run,
    refuses: Run,
    checkpoint: Path,
    book: Path,
    other: Path,
    stop_after: Callable[[int], None],
) -> None:
    build(book, "-o", "m", "--segment-size", "60")
    add = ("memory", "append", "--checkpoint", checkpoint, "--device", "cpu", "m")
    third = other.with_name("third.txt")
    third.write_bytes(book.read_bytes())
    stop_after(3)
    assert drt(*add, other, third).exit_code == 130
    assert len(facts(drt, "m")["documents"]) == 1  # as it was before
    assert "an append was interrupted" in drt("memory", "info", "m").stdout
    assert "has an unfinished build of" in refuses(*add, third)
    assert "or drop what it has read: drt memory rollback m" in drt("memory", "info", "m").stdout
    assert drt(*add, other, third).exit_code == 0
    assert [one["name"] for one in facts(drt, "m")["documents"]] == [str(book), str(other), str(third)]
    assert drt("memory", "verify", "m").exit_code == 0
    assert f"m holds {other} already: " in refuses(*add, other)
    build_again = ("memory", "build", "--checkpoint", checkpoint, "-o", "m", "--segment-size", "60")
    assert "and drt memory append" not in refuses(*build_again, book)
    assert "drt memory append adds documents to it" in refuses(*build_again, book)


def test_a_text_that_has_changed_is_refused_by_build(build: Run, refuses: Run, checkpoint: Path) -> None:
    again = ("memory", "build", "--checkpoint", checkpoint, "notes.txt", "-o", "m")
    Path("notes.txt").write_text("The code is |aa=11111|.")
    build("notes.txt", "-o", "m")
    before = content(Path("m"))
    assert "m is complete" in build(Path("notes.txt").absolute(), "-o", "m").stdout
    for changed in (
        "The code is |aa=99999|.",
        "The code is |aa=11111|",
        "The code is |aa=11111|. And",
        "Other",
    ):
        Path("notes.txt").write_text(changed)
        message = refuses(*again)
        assert "m holds another text of the name notes.txt" in message
    assert content(Path("m")) == before


def test_files_of_one_name_are_told_apart(
    drt: Run, build: Run, refuses: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("notes.txt").write_text("The code is |aa=11111|.")
    build("notes.txt", "-o", "m")
    Path("other").mkdir()
    Path("other", "notes.txt").write_text("Another note. |bb=22222|")
    monkeypatch.chdir("other")
    options = ("--checkpoint", checkpoint, "--device", "cpu", "../m", "notes.txt")
    assert "holds another text of the name notes.txt" in refuses(
        "memory", "build", *options[:-2], "-o", *options[-2:]
    )
    assert drt("memory", "append", *options).exit_code == 0
    names = ["notes.txt", str(Path("notes.txt").absolute())]
    assert [one["name"] for one in facts(drt, "../m")["documents"]] == names
    assert "../m holds notes.txt already" in refuses("memory", "append", *options)
    monkeypatch.chdir("..")
    assert "m holds notes.txt already" in refuses("memory", "append", *options[:-2], "m", "notes.txt")
    assert "m is complete" in build("notes.txt", "other/notes.txt", "-o", "m").stdout


@pytest.mark.parametrize("gone", [True, False])
def test_an_append_whose_text_is_gone_can_be_dropped(
    drt: Run,
    build: Run,
    refuses: Run,
    checkpoint: Path,
    book: Path,
    other: Path,
    stop_after: Callable[[int], None],
    gone: bool,
) -> None:
    build(other, "-o", "m", "--segment-size", "60")
    before = content(Path("m"))
    add = ("memory", "append", "--checkpoint", checkpoint, "--device", "cpu", "m")
    stop_after(3)
    assert drt(*add, book).exit_code == 130
    text = book.read_bytes()
    if gone:
        book.unlink()
    else:
        book.write_bytes(text[:10] + b"!" + text[11:])
    third = other.with_name("third.txt")
    third.write_text("a third text")
    for command in ((*add, book), (*add, third), ("memory", "index", "m")):
        assert "drt memory rollback m" in refuses(*command)
    assert "drt memory rollback m" in drt("memory", "verify", "m").stdout
    assert "m: dropped 180 tokens; it holds 22 tokens of 1 document" in drt("memory", "rollback", "m").stdout
    assert content(Path("m")) == before
    assert "m: nothing is unfinished; it holds 22 tokens" in drt("memory", "rollback", "m").stdout
    assert drt(*add, third).exit_code == 0
    assert drt("memory", "verify", "m").exit_code == 0


def test_a_first_build_can_be_dropped(
    drt: Run, build: Run, checkpoint: Path, book: Path, other: Path, stop_after: Callable[[int], None]
) -> None:
    stop_after(2)
    options = ("--checkpoint", checkpoint, "--segment-size", "60", "-o", "m")
    assert drt("memory", "build", book, *options).exit_code == 130
    book.unlink()
    assert drt("memory", "rollback", "m").exit_code == 0
    build(other, "-o", "m", "--dtype", "int8")
    assert [one["name"] for one in facts(drt, "m")["documents"]] == [str(other)]


def test_an_archive_in_a_folder_of_texts_is_none_of_them(
    drt: Run, build: Run, checkpoint: Path, book: Path, stop_after: Callable[[int], None]
) -> None:
    Path("texts").mkdir()
    for name in ("a.txt", "z.txt"):
        Path("texts", name).write_bytes(name.encode() + book.read_bytes())
    stop_after(4)
    options = ("texts", "-o", "texts/m", "--segment-size", "60")
    assert drt("memory", "build", "--checkpoint", checkpoint, *options).exit_code == 130
    build(*options)
    assert "texts/m is complete" in build(*options).stdout
    assert [one["name"] for one in facts(drt, "texts/m")["documents"]] == ["texts/a.txt", "texts/z.txt"]


def test_verify_names_a_link_in_place_of_a_file(drt: Run, build: Run, book: Path) -> None:
    build(book, "-o", "m")
    Path("m", "text.bin").unlink()
    for target in ("nowhere", "/dev/zero", book):
        Path("m", "text.bin").symlink_to(target)
        result = drt("memory", "verify", "m")
        assert (result.exit_code, result.stdout.count("\n")) == (1, 1)
        assert "m/text.bin: expected a regular file, got a symbolic link" in result.stdout
        Path("m", "text.bin").unlink()


def test_ctrl_c_before_anything_was_read_leaves_no_folder(
    drt: Run, checkpoint: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_drt, "read_documents", stopped)
    result = drt("memory", "build", "--checkpoint", checkpoint, book, "-o", "some/m")
    assert result.exit_code == 130
    assert "stopped before anything was read" in result.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", ["itself", "link", "hard link"])
@pytest.mark.parametrize("name", ["text.bin", "segments.jsonl", "manifest.json"])
def test_an_archive_does_not_read_its_own_files(
    build: Run, refuses: Run, checkpoint: Path, other: Path, name: str, kind: str
) -> None:
    build(other, "-o", "m")
    own, source = Path("m", name), Path("source.txt")
    if kind == "itself":
        source = own
    elif kind == "link":
        source.symlink_to(own)
    else:
        source.hardlink_to(own)
    message = refuses("memory", "append", "--checkpoint", checkpoint, "m", source)
    assert f"{source} is a file of m" in message
    with Archive.open("m") as archive:
        assert archive.finished


def test_an_index_is_told_of_used_and_verified(
    drt: Run, build: Run, checkpoint: Path, book: Path, other: Path
) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")
    build(book, "-o", "m")
    chunks = facts(drt, "m")["chunks"]
    result = drt("memory", "index", "m")
    assert (result.exit_code, result.stdout) == (0, f"m: {chunks} chunks are indexed\n")
    assert f"index      of {chunks} chunks" in drt("memory", "info", "m").stdout
    options = ("--checkpoint", checkpoint, "--device", "cpu")
    assert drt("memory", "append", *options, "m", other).exit_code == 0
    known = facts(drt, "m")
    assert known["indexed"] == chunks < known["chunks"]
    assert known["bytes"] == sum(file.stat().st_size for file in Path("m").iterdir())
    answers = [drt("ask", "m", "who?", *options, "--search", how).stdout for how in ("index", "exact")]
    assert answers[0] == answers[1] != ""
    assert drt("memory", "verify", "m").exit_code == 0
    path = Path("m", "landmarks.faiss")
    path.write_bytes(path.read_bytes()[:-1])
    result = drt("memory", "verify", "m")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{path} is damaged")
    assert result.stdout.count("\n") == 1
    assert "drt memory index m" in result.stdout


@pytest.mark.parametrize(
    "name", ["chunks.bin", "landmarks.bin", "index.bin", "text.bin", "segments.jsonl", "manifest.json"]
)
def test_verify_names_what_is_damaged(drt: Run, build: Run, book: Path, name: str) -> None:
    build(book, "-o", "m")
    path = Path("m", name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = drt("memory", "verify", "m")
    assert result.exit_code == 1
    assert name in result.stdout
    path.unlink()
    result = drt("memory", "verify", "m")
    assert result.exit_code == 1
    assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.txt", "-o", "m"], "nothing.txt: cannot be read: No such file or directory"),
        (["none", "-o", "m"], "none: expected a folder with text files in it, got none"),
        (["empty.txt", "-o", "m"], "empty.txt is empty"),
        (["a.txt", "a.txt", "-o", "m"], "a.txt is named twice"),
        (["a.txt", "full/../a.txt", "-o", "m"], "full/../a.txt is named twice"),
        (["a.txt", "-o", "m", "--dtype", "int4"], "--dtype: expected bfloat16, float32, float16 or int8, got 'int4'"),
        (["a.txt", "-o", "m", "--segment-size", "many"], "expected a length such as 4096, 64K or 1M, got 'many'"),
        (["a.txt", "-o", "full"], "full holds other files (notes); choose an empty folder"),
        (["a.txt", "-o", "a.txt"], "a.txt"),
        (["a.txt", "-o", "m", "--checkpoint", "nothing"], "no checkpoint folder at nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(refuses: Run, checkpoint: Path, arguments: list[str], message: str) -> None:
    Path("empty.txt").touch()
    Path("none").mkdir()
    Path("none", "picture").write_bytes(b"\0")
    Path("a.txt").write_text("a text")
    Path("full").mkdir()
    Path("full", "notes").touch()
    assert message in refuses("memory", "build", "--checkpoint", checkpoint, *arguments)
    assert not Path("m").exists()


def test_an_index_of_an_earlier_format_hides_nothing_else(drt: Run, build: Run, book: Path) -> None:
    build(book, "-o", "m")
    known = facts(drt, "m")
    Path("m", "landmarks.faiss").write_text('{"format": "drt-landmark-index", "format_version": 1}\n')
    after = facts(drt, "m")
    assert (after["tokens"], after["documents"], after["indexed"]) == (known["tokens"], known["documents"], 0)
    assert "format version 1" in after["index_problem"]
    assert "drt memory index m" in drt("memory", "info", "m").stdout


def test_to_verify_a_folder_that_is_none_is_a_mistake(refuses: Run, book: Path) -> None:
    assert refuses("memory", "verify", "nowhere").startswith("nowhere: expected the folder of an archive")
    assert refuses("memory", "verify", book).startswith(f"{book}: expected the folder of an archive")


@pytest.mark.parametrize("command", ["append", "index", "info"])
def test_a_folder_that_is_no_archive_is_refused(refuses: Run, book: Path, command: str) -> None:
    files = [book] if command == "append" else []
    assert "here is not an archive: it has no manifest.json" in refuses("memory", command, "here", *files)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ab Bücher".encode("latin-1"), "invalid start byte at byte 4"),
        ("abcdefé".encode() + b"\xff", "invalid start byte at byte 8"),
        ("abcdefghijk€".encode()[:-1], "it ends within a character"),
    ],
)
def test_text_that_is_not_utf8_is_refused(
    refuses: Run, monkeypatch: pytest.MonkeyPatch, text: bytes, problem: str
) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 7)  # é is cut
    Path("latin.txt").write_bytes(text)
    assert f"latin.txt is not UTF-8 text: {problem}" in refuses("memory", "build", "latin.txt", "-o", "m")


def test_a_folder_and_packed_texts_are_read(drt: Run, build: Run) -> None:
    """In the order of their names; where the archive was interrupted the texts are compared, not the files."""
    texts = {"a.txt": b"first", "b.txt.gz": b"second", "below/c.txt.xz": b"third"}
    for name, text in texts.items():
        path = Path("books", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text))
    Path("books", "picture.png").write_bytes(b"\x89PNG\0")
    build("books", "-o", "m")
    documents = facts(drt, "m")["documents"]
    assert [one["name"].rpartition("books/")[2] for one in documents] == list(texts)
    assert [one["num_bytes"] for one in documents] == [5, 6, 5]
    assert Path("m", "text.bin").read_bytes() == b"firstsecondthird"


def test_a_pipe_is_refused(refuses: Run) -> None:
    os.mkfifo("pipe")
    assert "pipe: expected a regular file, got a pipe" in refuses("memory", "build", "pipe", "-o", "m")


def test_a_second_writer_is_refused(
    refuses: Run, build: Run, checkpoint: Path, book: Path, other: Path
) -> None:
    build(book, "-o", "m")
    with ArchiveWriter.open("m"):
        message = refuses("memory", "append", "m", other, "--checkpoint", checkpoint)
    assert "another process is writing to m" in message


def test_other_settings_models_and_tokenizers_are_refused(
    refuses: Run, build: Run, checkpoint: Path, book: Path, other: Path, tmp_path: Path
) -> None:
    build(book, "-o", "m")
    again = ("memory", "build", book, "-o", "m", "--checkpoint")
    assert "m was begun with --dtype bfloat16, got float32" in refuses(
        *again, checkpoint, "--dtype", "float32"
    )
    assert "m was begun with --segment-size 4096, got 60" in refuses(
        *again, checkpoint, "--segment-size", "60"
    )
    changed = tmp_path / "changed"
    torch.manual_seed(1)
    DRTForCausalLM(DRTConfig.from_pretrained(checkpoint)).save_pretrained(changed)
    ByT5Tokenizer(extra_ids=0).save_pretrained(changed)
    assert "m was made by another model" in refuses(*again, changed)
    assert "m was made by another model" in refuses("memory", "append", "m", other, "--checkpoint", changed)
    assert "m was made by another model" in refuses("ask", "m", "hello", "--checkpoint", changed)
    DRTForCausalLM.from_pretrained(checkpoint).save_pretrained(changed)
    ByT5Tokenizer(extra_ids=5).save_pretrained(changed)
    assert "m was made with another tokenizer" in refuses("ask", "m", "hello", "--checkpoint", changed)
    with Archive.open("m") as archive:
        assert len(archive.documents) == 1


@pytest.mark.parametrize("name", ["chunks.bin", "landmarks.faiss"])
def test_a_link_that_leads_nowhere_is_named(drt: Run, build: Run, book: Path, name: str) -> None:
    build(book, "-o", "m")
    Path("m", name).unlink(missing_ok=True)
    Path("m", name).symlink_to("nowhere")
    result = drt("memory", "verify", "m")
    assert result.exit_code == 1
    assert f"m/{name}: expected a regular file, got a symbolic link" in result.stdout
