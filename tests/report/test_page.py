"""The page: every kind of record has its place in it, in both forms."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from drt.errors import DRTError
from drt.eval.results import AnswerRecord, NeedleRecord, TrainingRecord
from drt.report.page import Picture, build_page, to_html, to_markdown, write_page
from drt.report.tables import Table
from drt.terminal import visible

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
    assert "| a\\|b \\<i> |" in text
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


def test_names_that_differ_only_in_separators_have_pictures_of_their_own(
    tmp_path: Path, perplexity: MakePerplexity
) -> None:
    names = ["books test", "books/test", "books-test", "Books test", "books test 2", "一", "二", "x" * 300]
    records = [record for i, name in enumerate(names) for record in perplexity("drt", 1 + i / 9, data=name)]
    markdown, _ = write_page(build_page(records), tmp_path)
    pictures = re.findall(r"\((.+?\.png)\)", markdown.read_text())
    assert pictures[:5] == [
        "loss-by-position-books-test.png",
        "loss-by-position-books-test-2.png",
        "loss-by-position-books-test-3.png",
        "loss-by-position-Books-test-4.png",
        "loss-by-position-books-test-2-2.png",
    ]
    assert len({picture.lower() for picture in pictures}) == len(names)
    assert len({(tmp_path / picture).read_bytes() for picture in pictures}) == len(names)


HOSTILE = (
    "[x](javascript:alert(1))",
    "![x](http://127.0.0.1/)",
    "<script>alert(1)</script>",
    "<javascript:alert(1)>",
    "a | b\n\n# c",
    "`code` **bold** _it_ ~~s~~ a_b \\[x\\](y)",
    "&lt;b&gt; &#91;x](y)",
    "$$x$$ $\\frac$ \\$",
    "\x1b[31m\x9b\u202e\ud800 \x00 **1.5** **",
    "_private",
)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_text_and_nothing_else(
    perplexity: MakePerplexity, needles: list[NeedleRecord], training: TrainingRecord,
    answers: list[AnswerRecord], name: str,
) -> None:  # fmt: skip
    records = [
        *(replace(record, checkpoint=name, data=name) for record in perplexity(name, 0.9)),
        *perplexity("other", 1.0, data=name),
        *(replace(record, checkpoint=name) for record in needles),
        replace(training, checkpoint=name, architecture=name, device=name),
        replace(answers[0], task=name, checkpoint=name, scores={name: 0.5}),
    ]
    blocks = build_page(records)
    markdown = to_markdown(blocks)
    page = to_html(blocks, {block.name: b"" for block in blocks if isinstance(block, Picture)})
    shown = visible(name, line=True)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children or ()}
    assert kinds <= {"text", "image", "softbreak", "strong_open", "strong_close", "text_special"}
    assert not [token for token in tokens if token.type.startswith(("html", "blockquote", "list"))]
    cells = {"".join(child.content for child in token.children or ()) for token in inline}
    assert {shown, f"Language modelling: {shown}", f"{shown}, %"} <= cells
    assert f"<td>{escape(shown)}</td>" in page
    assert f"<h2>{escape(shown)}</h2>" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page + markdown)


def test_what_cannot_be_reported(tmp_path: Path, perplexity: MakePerplexity) -> None:
    with pytest.raises(DRTError, match="at least one record"):
        build_page([])
    with pytest.raises(DRTError, match="reference: expected one of drt, got 'x'"):
        build_page(perplexity("drt", 1.0), reference="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(DRTError, match="file: expected a folder"):
        write_page(build_page(perplexity("drt", 1.0)), tmp_path / "file")


def test_positions_reach_the_table(perplexity: MakePerplexity) -> None:
    table = build_page(perplexity("drt", 1.0), positions=[16384])[0]
    assert isinstance(table, Table)
    assert table.columns[-2:] == ("0-16K", "16K-")
