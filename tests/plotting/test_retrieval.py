"""The page of retrieved passages: what it says, that nothing in it can act, and how a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from drt.eval.results import RetrievalRecord
from drt.eval.retrieval import Answer
from drt.plotting.retrieval import retrieval_page

MakeRecord = Callable[..., RetrievalRecord]
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\" ' & \u202e\x00\x1b\ud800 é"


@pytest.fixture
def make_record() -> MakeRecord:
    """A record with defaults: `make_record(group=1, weight=0.25, ...)`."""
    values: dict[str, Any] = {
        "task": "retrieval",
        "checkpoint": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "index": 0,
        "question": "|qx?",
        "answer": "48213, and on",
        "step": 0,
        "generated": "",
        "group": 0,
        "rank": 0,
        "chunk": 40,
        "weight": 0.75,
        "document": "book.txt",
        "document_bytes": 4000,
        "start": 1000,
        "stop": 1031,
        "passage": "a gesture, |qx=482",
        "before": "they made ",
        "after": "13| and went",
    }
    return lambda **changes: RetrievalRecord(**values | changes)


@pytest.fixture
def answer(make_record: MakeRecord) -> Answer:
    """Two groups, two documents, two steps."""
    records = [
        make_record(),
        make_record(rank=1, weight=0.25, chunk=99, document="other.txt", start=0, stop=31, passage="first"),
        make_record(group=1, weight=1.0),
        make_record(step=31, generated="48213, and", group=0, weight=1.0, start=3990, stop=4000, chunk=70),
    ]
    return Answer("|qx?", "48213, and on", records)


class Outline(HTMLParser):
    """Tags with their attributes in order, and the text of each element of a class."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", page.partition("</style>")[2]))


def test_it_shows_question_answer_passages_and_facts(answer: Answer) -> None:
    page = retrieval_page([answer], {"memory": "book.memory"})
    text = text_of(page)
    for shown in (
        "|qx?",
        "48213, and on",
        "memory",
        "book.memory",
        "they made a gesture, |qx=48213| and went",
    ):
        assert shown in text
    assert "book.txt, bytes 1,000 to 1,031" in text
    assert "after 31 tokens of the answer, …48213, and" in text
    assert page.count("<mark>") == page.count("</mark>") >= 2
    assert "<mark>482</mark>" in page  # the number continues in the next chunk
    assert '<span class="faint"><mark>13</mark>| and went</span>' in page


def test_a_passage_that_two_groups_read_is_shown_once_with_a_bar_for_each(answer: Answer) -> None:
    page = retrieval_page([answer], {})
    passages = re.findall(r'<li id="([^"]*)">(.*?)</li>', page, re.DOTALL)
    assert [name for name, _ in passages] == [
        "question-0-step-0-chunk-40",
        "question-0-step-0-chunk-99",
        "question-0-step-31-chunk-70",
    ]
    widths = [re.findall(r"width: ([\d.]+)%", passage) for _, passage in passages]
    assert widths == [["75.0", "100.0"], ["25.0"], ["100.0"]]


def test_marks_lie_where_the_passages_lie(answer: Answer) -> None:
    marks = re.findall(
        r'href="#([^"]*)"><rect x="([\d.]+)" y="0" width="([\d.]+)"', retrieval_page([answer], {})
    )
    assert [(name, float(left)) for name, left, _ in marks] == [
        ("question-0-step-0-chunk-40", 250.0),
        ("question-0-step-0-chunk-40", 250.0),
        ("question-0-step-0-chunk-99", 0.0),
        ("question-0-step-31-chunk-70", 997.0),
    ]
    assert all(float(left) + float(width) <= 1000 and float(width) >= 3 for _, left, width in marks)


def test_every_link_leads_somewhere(answer: Answer) -> None:
    outline = Outline(retrieval_page([answer, answer], {}))
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"] for _, attributes in outline.tags if "href" in attributes]
    assert {link.removeprefix("#") for link in links if link} == set(names)


def test_a_question_without_passages_says_so() -> None:
    assert "Nothing was retrieved" in retrieval_page([Answer("hello", "", [])], {})


def test_no_text_of_anyone_becomes_markup(make_record: MakeRecord) -> None:
    fields = ("question", "answer", "generated", "document", "passage", "before", "after")
    records = [make_record(step=step, **dict.fromkeys(fields, HOSTILE)) for step in (0, 31)]
    page = retrieval_page([Answer(HOSTILE, HOSTILE, records)] * 2, {HOSTILE: HOSTILE})
    harmless = retrieval_page(
        [Answer("q", "a", [make_record(step=step) for step in (0, 31)])] * 2, {"b": "c"}
    )
    tags = [tag for tag, _ in Outline(page).tags if tag not in ("mark", "span")]
    assert tags == [tag for tag, _ in Outline(harmless).tags if tag not in ("mark", "span")]
    page.encode()  # the lone surrogate is gone
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_it_needs_no_network_and_no_script(answer: Answer) -> None:
    page = retrieval_page([answer], {})
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {
        tag for tag, _ in outline.tags
    }
    for _, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


@pytest.mark.slow
def test_a_browser_shows_it(answer: Answer, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(retrieval_page([answer], {"memory": "book.memory"}), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    options = ["--hide-scrollbars", "--window-size=1000,900", "--blink-settings=preferredColorScheme=1"]
    shown = subprocess.run(
        [*command, *options, f"--screenshot={picture}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert (
        text_of(shown).count("they made a gesture, |qx=48213| and went") == 2
    )  # the second step's, folded up
    pixels = np.round(imread(picture)[..., :3] * 255).astype(int)
    assert pixels.shape == (900, 1000, 3)
    background = pixels[0, 0]
    assert (background == 255).all()
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xFF, 0xE5, 0x8A)):  # two groups, the mark
        assert (pixels == colour).all(axis=2).sum() > 300
    assert (pixels[:, -15:] == background).all()  # nothing runs over the margin
