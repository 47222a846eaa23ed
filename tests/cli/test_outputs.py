"""What commands write: regular files and new names only; links, devices and pipes stay as they are."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drt.data.tokenizer import save_tokenizer, train_tokenizer
from drt.errors import DRTError
from drt.eval.results import AnswerRecord, RecordWriter, read_records
from drt.eval.runs import claim_folder
from drt.report.page import build_page, write_page

Run = Callable[..., Any]
KEPT = "what someone else's file holds"
RECORD = AnswerRecord(
    task="summarization", checkpoint="m", device="cpu", dtype="float32", data="d", index=0, length=9,
    expected=["a"], generated="b", scores={"rouge1": 0.5},
)  # fmt: skip


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_text(KEPT)
    return path


def put(kind: str, path: Path, target: Path) -> Path:
    """Something that is no regular file at `path`; returns where it is."""
    if kind == "device":
        return Path("/dev/full")
    path.parent.mkdir(exist_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("nowhere"))
    else:
        os.mkfifo(path)
    return path


OUTPUTS = [
    ("ask", "--html", ("ask", "archive", "who?")),
    ("ask", "--trace", ("ask", "archive", "who?")),
    ("needle", "--json", ("needle", "--length", "512")),
    ("needle", "--plot", ("needle", "--length", "512")),
    ("perplexity", "--json", ("eval", "perplexity", "--data", "text")),
    ("ruler", "--json", ("eval", "ruler")),
    ("summarization", "--json", ("eval", "summarization", "--data", "text")),
]


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device"])
@pytest.mark.parametrize(
    ("name", "option", "command"), OUTPUTS, ids=[f"{row[0]} {row[1]}" for row in OUTPUTS]
)
def test_an_option_that_names_no_regular_file_is_refused_first(
    refuses: Run, tmp_path: Path, target: Path, name: str, option: str, command: tuple[str, ...], kind: str
) -> None:
    suffix = ".png" if option == "--plot" else ""
    if suffix and kind == "device":
        pytest.skip("no device has the name of a picture")
    path = put(kind, tmp_path / f"out{suffix}", target)
    before = path.lstat()
    message = refuses(*command, "--checkpoint", tmp_path / "none", option, path)
    assert message.startswith(f"{option} {path}: expected a regular file")
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert target.read_text() == KEPT
    assert not target.with_name("nowhere").exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_follows_no_link(tmp_path: Path, target: Path, name: str, kind: str) -> None:
    put(kind, tmp_path / "page" / name, target)
    with pytest.raises(DRTError, match=name):
        write_page(build_page([RECORD]), tmp_path / "page")
    assert target.read_text() == KEPT


def test_records_and_settings_follow_no_link(tmp_path: Path, target: Path) -> None:
    (tmp_path / "settings.json").symlink_to(target.with_name("nowhere"))
    with pytest.raises(DRTError, match=r"settings\.json"):
        claim_folder(tmp_path, {})
    (tmp_path / "out.jsonl").symlink_to(target)
    for append in (False, True):
        with pytest.raises(DRTError, match=r"out\.jsonl"):
            RecordWriter(tmp_path / "out.jsonl", append)
    assert target.read_text() == KEPT
    assert not target.with_name("nowhere").exists()


def test_a_tokenizer_follows_no_link(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "tokenizer"
    put("link", folder / "tokenizer.json", target)
    tokenizer = train_tokenizer(["some words of text"] * 9, 260)
    with pytest.raises(DRTError, match=r"tokenizer\.json"):
        save_tokenizer(tokenizer, folder)
    assert target.read_text() == KEPT
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    (folder / "tokenizer.json").unlink()
    save_tokenizer(tokenizer, folder)
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_records_go_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for append in (False, True, True):
        with RecordWriter(path, append) as writer:
            writer.write(RECORD)
        with path.open("ab") as file:
            file.write(b'{"task": "sum')
    assert read_records(path, AnswerRecord) == [RECORD] * 3


def test_a_disk_that_is_full_names_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path / "out.jsonl")

    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            writer_file.close()

    writer_file, writer._file = writer._file, Full()  # type: ignore[assignment]
    with pytest.raises(DRTError, match=r"out\.jsonl: cannot be written: No space left"), writer:
        writer.write(RECORD)
