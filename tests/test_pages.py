"""The README and docs: links lead somewhere, commands and options exist, every page is listed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from drt.cli.app import load_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Targets of the links and pictures of a page, those to other sites left out."""
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None and not urlsplit(str(target)).scheme:
                yield str(target)


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    titles = [title.content for token, title in pairwise(tokens(page)) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `drt` command in a page's blocks and spans of code; no loops or pipelines of a shell."""
    for token in tokens(page):
        blocks = [token.content] if token.type in ("fence", "code_block") else []
        blocks += [child.content for child in token.children or () if child.type == "code_inline"]
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            text = re.sub(r"^([A-Z_]+=\S+ )+", "", line.strip())
            if text.startswith("drt ") and "$" not in text and "|" not in text.partition('"')[0]:
                yield shlex.split(text, comments=True)


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The click command or group that words name, and the words after it."""
    command, rest = load_command(words[1]), words[2:]
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            return command, rest
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        command, rest = resolve(words)
        known = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        named = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert named <= known | {"--help", "-h"}, words
        assert not hasattr(command, "commands") or rest[:1] in ([], ["--help"]), words


def test_what_is_read_is_not_nothing() -> None:
    readme = list(commands(ROOT / "README.md"))
    assert {words[1] for words in readme} >= {"memory", "ask", "needle", "generate"}
    assert len(list(links(ROOT / "README.md"))) > 10


def test_every_page_is_listed() -> None:
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs/README.md")}
    assert listed >= set(PAGES) - {ROOT / "docs/README.md"}


@each_page
def test_no_page_names_another_project_to_install(page: Path) -> None:
    assert not re.search(r"pip install (\S+ )*['\"]?drt(?!-lm)\b", page.read_text(encoding="utf-8"))
