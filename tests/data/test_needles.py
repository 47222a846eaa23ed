"""Needle samples: repeatable, exactly as long as asked, and with one right answer."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from drt.data.formats import NAMES, name_uses
from drt.data.haystack import Haystack
from drt.data.needles import TASKS, NeedleSample, is_correct, make_sample, parse_length
from drt.data.tokens import TextCodec
from drt.errors import DRTError

BYTES = TextCodec(ByT5Tokenizer(extra_ids=0))
CHUNK = 15  # tokens between the borders that needles should not respect
NEEDLE = re.compile(r"\|([a-z]{2})[=>](\d{5}|[a-z]{2})\|")


@pytest.fixture
def make(byte_tokenizer: Any, books: Haystack) -> Any:
    """A sample with defaults: `make(task="single", length=600, depth=0.5, seed=3, index=0, ...)`."""

    def make(
        task: str = "single",
        length: int = 600,
        depth: float = 0.5,
        seed: int = 3,
        index: int = 0,
        text: Any = books,
        tokenizer: Any = byte_tokenizer,
        **counts: int,
    ) -> NeedleSample:
        return make_sample(task, tokenizer, text, length, depth, seed, index, **counts)

    return make


def plain(sample: NeedleSample) -> dict[str, Any]:
    """What a sample holds, comparable with `==`."""
    values = vars(sample).items()
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values}


def needles_of(sample: NeedleSample, spans: Any, codec: TextCodec) -> list[tuple[str, str]]:
    """(name, value) of the needles at `spans`, each of which holds a needle and nothing else."""
    found = [NEEDLE.fullmatch(codec.decode(sample.input_ids[start:end]).decode()) for start, end in spans]
    assert None not in found
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_follows_from_its_key_alone(make: Any, task: str) -> None:
    first = plain(make(task, index=4))
    for other in TASKS:
        make(other, seed=9, index=1)
    np.random.seed(11)  # noqa: NPY002 (the generator that must not matter)
    assert plain(make(task, index=4)) == first


@pytest.mark.parametrize("change", [{"seed": 4}, {"index": 1}, {"length": 601}, {"task": "multikey"}])
def test_every_part_of_the_key_matters(make: Any, change: dict[str, Any]) -> None:
    before, after = make(), make(**change)
    assert (before.question, before.expected) != (after.question, after.expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [100, 613, 1024])
def test_a_sample_is_what_it_says(make: Any, tokenizer: Any, task: str, length: int) -> None:
    codec = TextCodec(tokenizer)
    for index in range(8):
        depth = (index + 0.5) / 8
        sample = make(task, length, depth, index=index, tokenizer=tokenizer)
        assert (sample.task, sample.length, sample.depth) == (task, length, depth)
        assert sample.input_ids.shape == (length,)
        assert sample.input_ids.dtype == np.int32
        assert codec.decode(sample.input_ids).decode().endswith(sample.question)
        assert codec.decode(sample.answer_ids).decode() == sample.expected

        hidden = dict(needles_of(sample, sample.needle_spans, codec))
        assert len(hidden) == {"single": 1, "multikey": 6, "multihop": 4}[task]
        name = sample.question[1:3]
        if task == "multihop":
            assert sample.question == f"|{name}?>"
            assert sample.expected == f"{hidden[name]}>{hidden[hidden[name]]}"
        else:
            assert sample.question == f"|{name}?"
            assert sample.expected == hidden[name]
        asked = needles_of(sample, sample.asked_spans, codec)
        assert asked[0][0] == name
        assert all(before[1] == after[0] for before, after in pairwise(asked))
        assert list(sample.needle_spans) == sorted(sample.needle_spans)
        assert set(sample.asked_spans) <= set(sample.needle_spans)
        assert all(one[1] <= two[0] for one, two in pairwise(sample.needle_spans))


@pytest.mark.parametrize("task", TASKS)
def test_everything_else_is_one_piece_of_the_text(make: Any, books: Haystack, task: str) -> None:
    sample = make(task, 700)
    text = BYTES.decode(sample.input_ids)
    for start, end in reversed(sample.needle_spans):
        text = text[:start] + text[end:]
    assert text.removesuffix(sample.question.encode()) in books.text


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_the_asked_needle_lies_at_its_depth(make: Any, task: str, depth: float) -> None:
    longest = 11
    for index in range(10):
        sample = make(task, 800, depth, index=index)
        start, end = sample.asked_spans[0]
        room = 800 - len(sample.question) - (end - start)
        assert abs(start - depth * room) <= (0.5 if task == "single" else longest / 2 + 0.5)


def test_at_the_ends_of_the_text_nothing_lies_beyond_the_needle(make: Any) -> None:
    for index in range(10):
        assert make("single", depth=0.0, index=index).asked_spans[0][0] == 0
        last = make("single", depth=1.0, index=index)
        assert last.asked_spans[0][1] == 600 - len(last.question)


def test_needles_fall_anywhere_across_chunk_borders_too(make: Any) -> None:
    starts, crossing = set(), 0
    for index in range(150):
        ((start, end),) = make("single", 600, (index + 0.5) / 150, index=index).needle_spans
        starts.add(start % CHUNK)
        crossing += start // CHUNK != (end - 1) // CHUNK
    assert starts == set(range(CHUNK))
    assert crossing > 50


def test_the_other_needles_are_spread_over_the_whole_text(make: Any) -> None:
    starts = []
    for index in range(60):
        sample = make("multikey", 1000, 0.5, index=index)
        starts += [start for start, _ in set(sample.needle_spans) - set(sample.asked_spans)]
    counts, _ = np.histogram(starts, bins=4, range=(0, 1000))
    assert counts.min() > 0.6 * len(starts) / 4


def test_names_and_values_of_a_sample_are_distinct(make: Any) -> None:
    for index in range(20):
        sample = make("multikey", 1500, index=index, needles=40)
        found = needles_of(sample, sample.needle_spans, BYTES)
        assert len({name for name, _ in found}) == len({value for _, value in found}) == 40


@pytest.mark.parametrize(("hops", "chains"), [(1, 1), (2, 3), (4, 2)])
def test_chains_share_no_name(make: Any, hops: int, chains: int) -> None:
    sample = make("multihop", 900, hops=hops, chains=chains)
    links = needles_of(sample, sample.needle_spans, BYTES)
    assert len(links) == hops * chains
    assert len({name for link in links for name in link}) == (hops + 1) * chains
    assert sample.expected.count(">") == hops - 1


def test_what_the_text_already_holds_is_never_hidden_or_asked(make: Any) -> None:
    taken = NAMES[:640]
    text = "".join(f"So |{name}=12345| and |{name}? say. " for name in taken).encode()
    length = len(text) - 50  # every window holds nearly all of them
    for index in range(30):
        sample = make("multikey", length, index=index, text=text, needles=10)
        prompt = BYTES.decode(sample.input_ids)
        uses = name_uses(prompt)
        for start, end in sample.needle_spans:
            name = prompt[start + 1 : start + 3].decode()
            assert uses[name] == 1 + (name == sample.question[1:3]), (start, end)


def test_text_that_takes_every_name_is_refused(make: Any) -> None:
    text = "".join(f"|{name}=12345|" for name in NAMES).encode()
    with pytest.raises(DRTError, match="no name left"):
        make(length=len(text), text=text)


def text_that_completes(*free: str) -> bytes:
    """Text that takes every name but `free`, and makes `ab` ambiguous if a needle stands before it."""
    return b"ab=" + "".join(f"|{name}=12345|" for name in NAMES if name not in free).encode()


def test_text_that_completes_a_needle_to_another_is_avoided(make: Any) -> None:
    text = text_that_completes("ab", "cd")
    asked = {make(length=len(text), depth=0.0, text=text, index=index).question for index in range(10)}
    assert asked == {"|cd?"}


def test_text_that_completes_every_needle_to_another_is_refused(make: Any) -> None:
    text = text_that_completes("ab")
    with pytest.raises(DRTError, match="found no place for single needles in 20 windows"):
        make(length=len(text), depth=0.0, text=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": b"too short", "length": 200}, r"too short: expected 200 tokens of text, got 9 \(9 bytes\)"),
        ({"text": ""}, "too short: expected 600 tokens of text, got 0"),
        ({"length": 10}, "length 10 is too short for single: expected at least 14 tokens"),
        ({"task": "multikey", "length": 60}, "length 60 is too short for multikey: expected at least 64"),
        ({"task": "twohop"}, "unknown task 'twohop'; expected one of single, multikey, multihop"),
        ({"depth": 1.01}, r"depth: expected 0\.\.1, got 1\.01"),
        ({"depth": -0.5}, r"depth: expected 0\.\.1, got -0\.5"),
        ({"depth": float("nan")}, r"depth: expected 0\.\.1, got nan"),
        ({"seed": -1}, "seed: expected a number that is not negative, got -1"),
        ({"index": -2}, "index: expected a number that is not negative, got -2"),
        ({"needles": 0}, "needles: expected at least 1, got 0"),
        ({"hops": 0}, "hops: expected at least 1, got 0"),
        ({"chains": -3}, "chains: expected at least 1, got -3"),
    ],
)
def test_mistakes_are_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DRTError, match=message):
        make(**changes)


def test_the_shortest_prompt_is_the_needle_and_its_question(make: Any) -> None:
    sample = make(length=14)
    assert BYTES.decode(sample.input_ids) == (
        f"{sample.question[:3]}={sample.expected}|{sample.question}".encode()
    )


def test_a_string_is_a_haystack_too(make: Any, books: Haystack) -> None:
    assert plain(make(text=books.text.decode())) == plain(make(text=books)) == plain(make(text=books.text))


def test_an_answer_is_right_when_every_token_of_it_is(make: Any) -> None:
    sample = make()
    answer = sample.answer_ids.tolist()
    assert is_correct(sample, answer)
    assert is_correct(sample, np.array(answer, np.int64))
    assert is_correct(sample, [*answer, 7, 7])  # what follows does not count
    assert not is_correct(sample, [])
    assert not is_correct(sample, answer[:-1])
    assert not is_correct(sample, [7, *answer])
    for place in range(len(answer)):
        assert not is_correct(sample, [*answer[:place], answer[place] + 1, *answer[place + 1 :]])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("64K", 65536), ("1M", 2**20), (" 16K ", 16384), ("007", 7), ("12M", 12 * 2**20)],
)
def test_lengths_are_read(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["1Q", "", "0", "-1", "1.5K", "K", "1 K", "64KB", "0K", "1e6", "٣"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(DRTError, match="expected a length such as 4096, 64K or 1M, got"):
        parse_length(text)
