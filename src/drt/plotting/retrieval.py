"""Retrieval records as a page: question, answer, and the passages that were read for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from importlib.resources import files
from itertools import groupby

from drt.eval.results import RetrievalRecord
from drt.eval.retrieval import Answer
from drt.terminal import visible

HUES = 4  # colours of groups in retrieval.css; a fifth group has the first one's
SHOWN_MATCH = 5  # characters that a passage must share with the answer to be marked
WIDTH = 1000  # of a map, in its own units
LEAST_MARK = 3  # so that a passage of a book is still seen


def retrieval_page(answers: Sequence[Answer], about: Mapping[str, str]) -> str:
    """A page of HTML that needs nothing else: no network, no script, no other file.

    For the end of the prompt, and for each generated chunk after it: a map of each document with the place of every
    passage, one lane a group, and the passages themselves with a bar for each group's weight. The longest run of
    characters that a passage shares with the answer is marked.

    Args:
        answers: what was asked; all text may hold anything, it is escaped.
        about: facts for the head of the page, such as ``{"model": "needle-tiny"}``.

    Returns:
        The page, to be written as UTF-8.
    """
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in about.items())
    links = "".join(
        f'<li><a href="#question-{number}"><bdi>{_text(answer.question)}</bdi></a></li>'
        for number, answer in enumerate(answers)
    )
    body = "".join(_article(number, answer) for number, answer in enumerate(answers))
    style = files("drt.plotting").joinpath("retrieval.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What was retrieved</title>
<style>
{style}</style>
</head>
<body>
<h1>What was retrieved</h1>
<dl class="about">{facts}</dl>
{f"<nav><ol>{links}</ol></nav>" if len(answers) > 1 else ""}
{body}
<footer>A group is a part of the model that retrieves for itself; a later group's query has seen what the earlier ones
read. A bar shows the share of its group's attention to retrieved text, so the bars of one group add up to 100%. In a
map, a darker mark has more weight. In a passage, what is marked is the longest run of characters that it shares with
the answer.</footer>
</body>
</html>
"""


def _article(number: int, answer: Answer) -> str:
    records = sorted(answer.records, key=lambda record: record.step)
    steps = [list(members) for _, members in groupby(records, key=lambda record: record.step)]
    shown = "".join(
        _step(f"question-{number}", members, answer.text, first=members is steps[0]) for members in steps
    )
    return f"""<article id="question-{number}">
<div class="exchange">
<div><h2>Question</h2><p class="text" dir="auto">{_text(answer.question)}</p></div>
<div><h2>Answer</h2><p class="text answer" dir="auto">{_text(answer.text)}</p></div>
</div>
{shown or "<p>Nothing was retrieved: the memory held no chunk before the question's.</p>"}
</article>
"""


def _step(article: str, records: list[RetrievalRecord], answer: str, *, first: bool) -> str:
    """What was retrieved at one step: a map of each document, then the passages, the weightiest first."""
    step = records[0].step
    anchor = f"{article}-step-{step}"
    if step == 0:
        summary = "Read for the start of the answer"
    else:
        tail = records[0].generated[-40:]
        summary = f"Read after {step:,} tokens of the answer, <code>…<bdi>{_text(tail)}</bdi></code>"
    groups = sorted({record.group for record in records})
    passages: dict[int, list[RetrievalRecord]] = {}
    for record in sorted(records, key=lambda record: -record.weight):
        passages.setdefault(record.chunk, []).append(record)
    documents = dict.fromkeys(record.document for record in records)
    maps = "".join(
        _map(anchor, [record for record in records if record.document == document], groups)
        for document in documents
    )
    items = "".join(_passage(anchor, members, groups, answer) for members in passages.values())
    return f"""<details{" open" if first else ""}><summary>{summary}</summary>
{maps}<ol class="passages">
{items}</ol>
</details>
"""


def _map(anchor: str, records: list[RetrievalRecord], groups: list[int]) -> str:
    """One document as a strip for each group, with a mark for each passage."""
    document, length = records[0].document, records[0].document_bytes
    lanes = "".join(
        f'<div class="lane"><span>group {group + 1}</span><svg viewBox="0 0 {WIDTH} 18" '
        f'preserveAspectRatio="none" role="img" aria-label="passages of group {group + 1}">'
        + "".join(_map_mark(anchor, record) for record in records if record.group == group)
        + "</svg></div>\n"
        for group in groups
    )
    scale = "".join(f"<span>{length * quarter // 4:,}</span>" for quarter in range(5))
    return f"""<figure><figcaption><b><bdi>{_text(document)}</bdi></b><span>{length:,} bytes</span></figcaption>
{lanes}<div class="scale">{scale}</div></figure>
"""


def _map_mark(anchor: str, record: RetrievalRecord) -> str:
    scale = WIDTH / max(record.document_bytes, 1)
    width = max(LEAST_MARK, (record.stop - record.start) * scale)
    left = min(record.start * scale, WIDTH - width)
    return (
        f'<a href="#{anchor}-chunk-{record.chunk}"><rect x="{left:.1f}" y="0" width="{width:.1f}" height="18" '
        f'fill="var(--hue-{record.group % HUES})" fill-opacity="{0.25 + 0.75 * record.weight:.2f}">'
        f"<title>{record.weight:.0%} of group {record.group + 1}, at {record.start:,}</title></rect></a>"
    )


def _passage(anchor: str, records: list[RetrievalRecord], groups: list[int], answer: str) -> str:
    """One passage with the weight that each group gave it."""
    first = records[0]
    weights = {record.group: record.weight for record in records}
    bars = "".join(
        f'<div class="bar" style="--hue: var(--hue-{group % HUES})"><span>group {group + 1}</span>'
        f'<i><b style="width: {weights[group]:.1%}"></b></i><span>{weights[group]:.1%}</span></div>\n'
        for group in groups
        if group in weights
    )
    return f"""<li id="{anchor}-chunk-{first.chunk}">
<div class="where faint"><span><bdi>{_text(first.document)}</bdi>, bytes {first.start:,} to {first.stop:,}</span>\
<span>chunk {first.chunk:,}</span></div>
{bars}<p class="text" dir="auto">{_excerpt(first, answer)}</p></li>
"""


def _excerpt(record: RetrievalRecord, answer: str) -> str:
    """The passage between the text before and after it; the longest run that they share with the answer is marked."""
    pieces = (record.before, "faint"), (record.passage, "passage"), (record.after, "faint")
    match = SequenceMatcher(
        None, "".join(text for text, _ in pieces), answer, autojunk=False
    ).find_longest_match()
    found = answer[match.b : match.b + match.size]
    marked = range(match.a, match.a + match.size) if len(found.strip()) >= SHOWN_MATCH else range(0)
    shown, offset = "", 0
    for text, kind in pieces:
        start, stop = (min(max(end - offset, 0), len(text)) for end in (marked.start, marked.stop))
        inner = f"{_text(text[:start])}<mark>{_text(text[start:stop])}</mark>{_text(text[stop:])}"
        shown += f'<span class="{kind}">{inner if start < stop else _text(text)}</span>'
        offset += len(text)
    return shown


def _text(text: str) -> str:
    """Text that is shown as it is: markup escaped, control characters made visible, lone surrogates replaced."""
    return escape(visible(text))
