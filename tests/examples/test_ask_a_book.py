"""The example runs and finds what it hides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from drt.data.haystack import load_haystack

EXAMPLE = Path(__file__).parents[2] / "examples" / "ask_a_book.py"


@pytest.mark.parametrize(
    ("arguments", "code", "shown"), [(["--help"], 0, "FOLDER"), (["none.txt", "out"], 2, "none.txt")]
)
def test_help_and_mistakes(tmp_path: Path, arguments: list[str], code: int, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_finds_what_it_hides(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(load_haystack(None).text[:20_000])
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, text, tmp_path / "out"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for number, start in enumerate(
        ["|qx? 48213: from ", "Chapter 2. |qx? 48213: from ", "|zz? 77031: chunks [", "|qx? 48213: chunks ["]
    ):
        assert lines[number].startswith(start)
    assert lines[4:] == ["|ab? 12345", "|qx? 48213", "the archive is whole"]
    assert "48213" in (tmp_path / "out" / "page.html").read_text()
