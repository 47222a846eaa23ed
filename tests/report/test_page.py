"""The page: every kind of record has its place in it, in both forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drt.errors import DRTError
from drt.eval.results import AnswerRecord, NeedleRecord, TrainingRecord
from drt.report.page import build_page, write_page
from drt.report.tables import Table

from .conftest import MakePerplexity


def test_one_page_of_all_records(
    tmp_path: Path,
    perplexity: MakePerplexity,
    needles: list[NeedleRecord],
    training: TrainingRecord,
    answers: list[AnswerRecord],
) -> None:
    documents = [*perplexity("drt-s0", 0.9), *perplexity("drt-s1", 1.1), *perplexity("a|b <i>", 1.2)]
    markdown, html = write_page(
        build_page([*documents, training, *needles, *answers]), tmp_path / "deep" / "report"
    )
    text, page = markdown.read_text(), html.read_text()
    titles = [
        "Language modelling: books test",
        "Bits per byte minus those of drt: books test",
        "Bits per byte of each seed: books test",
        "Language modelling, the paper: PG19, 350M parameters, 16K tokens",
        "Training",
        "Needles found, %: single",
        "niah_multikey_2",
    ]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == titles
    assert re.findall(r"<h2>(.+?)</h2>", page) == titles
    assert "| a\\|b <i> |" in text
    assert "<td>a|b &lt;i&gt;</td>" in page
    assert "<strong>" in page
    assert "**" not in page
    assert "paper: Landmark Attention" in text
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures == ["loss-by-position-books-test.png", "needles.png", "cost.png"]
    for name in pictures:
        assert (markdown.parent / name).read_bytes().startswith(b"\x89PNG")
    assert page.count('src="data:image/png;base64,') == 3
    assert "http" not in page
    assert {path.name for path in markdown.parent.iterdir()} == {"report.md", "report.html", *pictures}


def test_two_corpora_are_two_tables(perplexity: MakePerplexity) -> None:
    blocks = build_page([*perplexity("drt", 0.9), *perplexity("drt", 0.9, data="linux test")])
    names = [block.title if isinstance(block, Table) else block.name for block in blocks]
    assert names[:4] == [
        "Language modelling: books test",
        "loss-by-position-books-test.png",
        "Language modelling: linux test",
        "loss-by-position-linux-test.png",
    ]


def test_what_cannot_be_reported(tmp_path: Path, perplexity: MakePerplexity) -> None:
    with pytest.raises(DRTError, match="at least one record"):
        build_page([])
    with pytest.raises(DRTError, match="wanted a reference of drt, got 'x'"):
        build_page(perplexity("drt", 1.0), reference="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(DRTError, match="cannot be written"):
        write_page(build_page(perplexity("drt", 1.0)), tmp_path / "file")


def test_positions_reach_the_table(perplexity: MakePerplexity) -> None:
    table = build_page(perplexity("drt", 1.0), positions=[16384])[0]
    assert isinstance(table, Table)
    assert table.columns[-2:] == ("0-16K", "16K-")
