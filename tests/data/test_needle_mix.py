"""The training mix: every question has one right answer, which lies before it in its row."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from drt.data.formats import NAMES, name_uses
from drt.data.haystack import Haystack
from drt.data.needle_mix import MixBatch, NeedleMix, NeedleMixConfig
from drt.data.tokens import TextCodec
from drt.errors import DRTError

CHUNK = 15
STAGE = {  # every field, so that no test hangs on a default
    "rows": 6,
    "row_length": 640,
    "chunk_size": CHUNK,
    "question_rate": 0.4,
    "dense_share": 1.0,
    "needles_per_question": 1.25,
    "spare_needles": 3,
    "chain_share": 0.0,
    "min_hops": 2,
    "max_hops": 2,
    "min_distance": 0,
    "hard_name_rate": 0.25,
    "decoy_rate": 0.2,
    "lookalike_rate": 0.0,
    "border_rate": 0.0,
    "text_positions": 100,
}


def stage(**changes: Any) -> NeedleMixConfig:
    return NeedleMixConfig(**STAGE | changes)


@pytest.fixture(scope="module")
def mix(books: Haystack, byte_tokenizer: Any) -> NeedleMix:
    return NeedleMix([books], byte_tokenizer)


@pytest.fixture(scope="module")
def bytes_codec(byte_tokenizer: Any) -> TextCodec:
    return TextCodec(byte_tokenizer)


class Asked(NamedTuple):
    """A question of a row, as it is found in the tokens."""

    start: int  # of the question
    end: int  # of the question, and start of the answer
    stop: int  # of the answer
    question: str
    answer: str


def questions(batch: MixBatch, row: int, codec: TextCodec) -> list[Asked]:
    """The questions of a row, by the masks; fails where the masks do not agree with the text."""
    ids = batch.input_ids[row]
    edges = np.flatnonzero(np.diff(batch.answer_mask[row].astype(int), prepend=0, append=0))
    found = []
    for begin, stop in edges.reshape(-1, 2).tolist():
        match = re.search(rb"\|[a-z]{2}\?>?$", codec.decode(ids[:begin]))
        assert match, codec.decode(ids[max(0, begin - 20) : stop])
        question = match[0].decode()
        start = begin - len(codec.encode(question))
        assert codec.decode(ids[stop : stop + len(codec.encode("|"))]) == b"|"
        found.append(Asked(start, begin, stop, question, codec.decode(ids[begin:stop]).decode()))
    assert np.flatnonzero(batch.chunk_ends[row]).tolist() == [one.end - 1 for one in found]
    return found


def right_answer(before: bytes, question: str) -> tuple[str, int]:
    """What a row's text says in answer, and the byte at which the last needle of it ends."""
    name = question[1:3].encode()
    if not question.endswith(">"):
        (fact,) = re.finditer(rb"\|%s=(\d{5})\|" % name, before)
        return fact[1].decode(), fact.end()
    names, end = [], 0
    while links := list(re.finditer(rb"\|%s>([a-z]{2})\|" % name, before)):
        (link,) = links
        name = link[1]
        names.append(name.decode())
        end = max(end, link.end())
    return ">".join(names), end


def all_questions(mix: NeedleMix, codec: TextCodec, made: NeedleMixConfig, steps: int) -> list[list[Asked]]:
    """Questions of each row, once they have been checked against the row's text."""
    rows = []
    for step in range(steps):
        batch = mix.batch(step, made, seed=5)
        for row in range(made.rows):
            asked = questions(batch, row, codec)
            for one in asked:
                before = codec.decode(batch.input_ids[row, : one.start])
                assert one.answer == right_answer(before, one.question)[0]
            rows.append(asked)
    return rows


def same(one: MixBatch, two: MixBatch) -> bool:
    return all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))


def test_a_batch_follows_from_step_stage_and_seed(
    mix: NeedleMix, books: Haystack, byte_tokenizer: Any
) -> None:
    made = stage(chain_share=0.3)
    first = mix.batch(7, made, seed=1)
    mix.batch(8, stage(rows=2), seed=3)
    np.random.seed(11)  # noqa: NPY002 (the generator that must not matter)
    assert same(first, mix.batch(7, made, seed=1))
    assert same(first, NeedleMix([books], byte_tokenizer).batch(7, made, seed=1))
    assert not same(first, mix.batch(8, made, seed=1))
    assert not same(first, mix.batch(7, made, seed=2))
    assert not same(first, mix.batch(7, stage(chain_share=0.4), seed=1))


def test_shapes_and_masks(mix: NeedleMix) -> None:
    batch = mix.batch(0, stage(chain_share=0.5), seed=0)
    assert {array.shape for array in batch} == {(6, 640)}
    assert batch.input_ids.dtype == np.int64
    assert {array.dtype for array in batch[1:]} == {np.dtype(bool)}
    assert batch.answer_mask.sum() > 100
    assert not (batch.chain_mask & ~batch.answer_mask).any()
    assert 0 < batch.chain_mask.sum() < batch.answer_mask.sum()
    assert not (batch.text_mask & (batch.answer_mask | batch.chunk_ends)).any()


@pytest.mark.parametrize("changes", [{}, {"chain_share": 1.0, "max_hops": 3}, {"chain_share": 0.5}])
def test_every_answer_is_what_the_row_says_before(
    mix: NeedleMix, bytes_codec: TextCodec, changes: dict[str, Any]
) -> None:
    rows = all_questions(mix, bytes_codec, stage(**changes), steps=4)
    assert sum(map(len, rows)) > 5 * len(rows)
    for asked in rows:
        assert len({one.question for one in asked}) == len(asked)  # nothing twice
    chains = [one.question.endswith(">") for asked in rows for one in asked]
    share = stage(**changes).chain_share
    assert abs(np.mean(chains) - share) <= (0.15 if 0 < share < 1 else 0)


def test_it_works_over_other_tokenizers(bpe_tokenizer: Any, books: Haystack) -> None:
    mix = NeedleMix([books], bpe_tokenizer)
    rows = all_questions(mix, TextCodec(bpe_tokenizer), stage(chain_share=0.3), steps=2)
    assert sum(map(len, rows)) > 3 * len(rows)


def test_chain_answers_are_marked(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    batch = mix.batch(0, stage(chain_share=0.5, max_hops=3), seed=0)
    hops = set()
    for row in range(6):
        for one in questions(batch, row, bytes_codec):
            is_chain = one.question.endswith(">")
            assert batch.chain_mask[row, one.end : one.stop].all() == is_chain
            assert batch.chain_mask[row, one.end : one.stop].any() == is_chain
            if is_chain:
                hops.add(one.answer.count(">") + 1)
    assert hops == {2, 3}


def test_a_dense_row_has_the_questions_asked_for(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    rows = all_questions(mix, bytes_codec, stage(), steps=3)
    assert {len(asked) for asked in rows} == {round(0.4 * 640 / (CHUNK + 1))}
    places = [one.start for asked in rows for one in asked]
    counts, _ = np.histogram(places, bins=4, range=(0, 640))
    assert counts.min() > 0.5 * len(places) / 4


def test_sparse_rows_have_fewer(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    counts = [len(asked) for asked in all_questions(mix, bytes_codec, stage(dense_share=0.0), steps=8)]
    assert min(counts) == 1
    assert max(counts) > 8
    assert np.mean(counts) < 0.6 * 16


@pytest.mark.parametrize("per_question", [0.2, 1.25])
def test_the_distance_is_kept(mix: NeedleMix, bytes_codec: TextCodec, per_question: float) -> None:
    least = 200
    made = stage(min_distance=least, needles_per_question=per_question)
    distances = []
    for step in range(4):
        batch = mix.batch(step, made, seed=5)
        for row in range(made.rows):
            text = bytes_codec.decode(batch.input_ids[row])
            last: dict[str, int] = {}
            for one in questions(batch, row, bytes_codec):
                told = right_answer(text[: one.start], one.question)[1]
                distances.append(one.start - max(told, last.get(one.question, 0)))
                last[one.question] = one.stop + 1
    assert len(distances) > 50
    assert least <= min(distances) < least + 40


def test_few_needles_are_asked_for_again(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    rows = all_questions(mix, bytes_codec, stage(needles_per_question=0.25, spare_needles=0), steps=3)
    for asked in rows:
        assert len(asked) > 10
        assert 1 < len({one.question for one in asked}) <= 4
        answers = {(one.question, one.answer) for one in asked}
        assert len(answers) == len({one.question for one in asked})


def test_questions_end_at_every_place_of_a_chunk(mix: NeedleMix) -> None:
    """Chunks fill from the left and close at a question's end, so each row shows the model short chunks too."""
    lengths = set()
    for step in range(20):
        for row in mix.batch(step, stage(), seed=0).chunk_ends:
            filled = 0
            for ends in row.tolist():
                filled += 1
                if ends:
                    lengths.add(filled)
                filled = 0 if ends or filled == CHUNK else filled
    assert lengths == set(range(1, CHUNK + 1))


def cut_needles(batch: MixBatch, codec: TextCodec) -> list[tuple[int, int]]:
    """(needles that the end of a chunk cuts, all needles) of each row; tokens are bytes."""
    counts = []
    for ids, ends in zip(batch.input_ids, batch.chunk_ends, strict=True):
        borders, held = set(), 0
        for position, ends_here in enumerate(ends):
            held += 1
            if ends_here or held == CHUNK:
                borders.add(position)
                held = 0
        spans = [match.span() for match in re.finditer(rb"\|[a-z]{2}=\d{5}\|", codec.decode(ids))]
        counts.append((sum(any(at in borders for at in range(a, b - 1)) for a, b in spans), len(spans)))
    return counts


def test_needles_are_moved_to_the_ends_of_chunks(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    def share(rate: float) -> float:
        made = stage(border_rate=rate, chunk_size=CHUNK, question_rate=0.2, spare_needles=0, row_length=1280)
        counts = np.concatenate([cut_needles(mix.batch(step, made, 1), bytes_codec) for step in range(8)])
        cut, needles = counts.sum(0)
        return cut / needles

    # A needle of ten tokens begins at one of fifteen places; at nine of them the end of a chunk cuts it.
    assert share(0.0) == pytest.approx(9 / 15, abs=0.06)
    assert share(1.0) > 0.95


def test_similar_names(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    def share(rate: float) -> float:
        text = bytes_codec.decode(mix.batch(0, stage(hard_name_rate=rate), seed=0).input_ids[0])
        names = {name.decode() for name in re.findall(rb"\|([a-z]{2})=", text)}
        pairs = [(one, two) for one in names for two in names if one < two]
        return float(np.mean([one[0] == two[0] or one[1] == two[1] for one, two in pairs]))

    assert share(1.0) > share(0.0) + 0.05


def test_decoys_are_pieces_of_needles(mix: NeedleMix, bytes_codec: TextCodec) -> None:
    def bars(rate: float) -> int:
        batch = mix.batch(0, stage(decoy_rate=rate), seed=0)
        asked = sum(len(questions(batch, row, bytes_codec)) for row in range(6))
        text = b" ".join(bytes_codec.decode(row) for row in batch.input_ids)
        return text.count(b"|") - 2 * len(re.findall(rb"\|[a-z]{2}=\d{5}\|", text)) - 2 * asked

    assert bars(0.0) <= 0 < bars(1.0)


def test_a_decoy_that_would_complete_a_needle_is_left_out(
    mix: NeedleMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []

    def window(length: int, rng: np.random.Generator) -> Any:
        windows.append(draw(length, rng))
        return windows[-1]

    draw = mix._window
    monkeypatch.setattr(mix, "_window", window)
    mix.batch(0, stage(rows=20, question_rate=0.8, decoy_rate=1.0), seed=0)
    assert len(windows) == 20, "no row had to be drawn anew"


def test_look_alikes_come_from_the_texts(
    books: Haystack, byte_tokenizer: Any, bytes_codec: TextCodec
) -> None:
    piece = b"j1 + i2 = j12; k3 = w4, x5 = y6 "
    mix = NeedleMix([books, Haystack(piece * 100)], byte_tokenizer, [1, 0])

    def pieces(rate: float) -> int:
        batch = mix.batch(0, stage(lookalike_rate=rate), seed=0)
        return sum(bytes_codec.decode(row).count(piece) for row in batch.input_ids)

    assert pieces(0.0) == 0
    assert 0 < pieces(0.2) < pieces(0.6)


@pytest.mark.parametrize(("wanted", "got"), [(0, 0), (100, 100), (10**6, None)])
def test_text_positions(mix: NeedleMix, wanted: int, got: int | None) -> None:
    batch = mix.batch(0, stage(text_positions=wanted, chain_share=0.2), seed=0)
    assert not batch.text_mask[:, 0].any()
    if got is not None:
        assert batch.text_mask.sum() == got
        return
    for row in range(6):  # all the text there is: without the rest nothing of a needle is left
        text = bytes(batch.input_ids[row][batch.text_mask[row]].astype(np.uint8) - 3)
        assert not re.search(rb"\d{5}", text)
        assert len(text) > 0.2 * 640


def test_what_is_not_hidden_is_one_piece_of_the_text(mix: NeedleMix, books: Haystack) -> None:
    batch = mix.batch(0, stage(text_positions=10**6), seed=0)
    for row in range(6):
        ids = batch.input_ids[row][batch.text_mask[row]]
        assert bytes(ids.astype(np.uint8) - 3) in books.text


@pytest.mark.parametrize("weights", [[0, 1], [1, 3], None])
def test_sources_are_drawn_by_weight_or_size(byte_tokenizer: Any, weights: list[float] | None) -> None:
    sources = [Haystack(b"A " * 2000), Haystack(b"B " * 6000)]
    batch = NeedleMix(sources, byte_tokenizer, weights).batch(0, stage(rows=200, row_length=64), seed=0)
    share = np.mean([(row == ord("B") + 3).any() for row in batch.input_ids])
    if weights == [0, 1]:
        assert share == 1
    else:
        assert abs(share - 0.75) < 0.12


def test_names_that_the_text_uses_are_not_used(byte_tokenizer: Any, bytes_codec: TextCodec) -> None:
    taken = NAMES[:600]
    text = "".join(f"So |{name}=12345| and. " for name in taken)
    made = stage(row_length=len(text), rows=2, question_rate=0.02, decoy_rate=0.0, chunk_size=63)
    batch = NeedleMix([Haystack(text.encode() * 2)], byte_tokenizer).batch(0, made, seed=0)
    asked = [one for row in range(2) for one in questions(batch, row, bytes_codec)]
    assert asked
    assert not {one.question[1:3] for one in asked} & set(taken)


def test_text_that_completes_a_needle_to_another_is_avoided(
    byte_tokenizer: Any, bytes_codec: TextCodec
) -> None:
    # Behind a needle's last `|` the text often goes on with a name and `=`.
    mix = NeedleMix([Haystack("".join(f"{name}=" for name in NAMES).encode())], byte_tokenizer)
    batch = mix.batch(0, stage(rows=30, decoy_rate=0.0, hard_name_rate=0.0), seed=0)
    for row in range(30):
        uses = name_uses(bytes_codec.decode(batch.input_ids[row]))
        for one in questions(batch, row, bytes_codec):
            assert uses[one.question[1:3]] == 2  # the needle and the question


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"row_length": 63}, "row_length: expected at least 64, got 63"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1"),
        ({"spare_needles": -1}, "spare_needles: expected at least 0"),
        ({"dense_share": 1.5}, r"dense_share: expected 0\.\.1, got 1\.5"),
        ({"chain_share": -0.1}, r"chain_share: expected 0\.\.1"),
        ({"hard_name_rate": 2}, r"hard_name_rate: expected 0\.\.1"),
        ({"decoy_rate": float("nan")}, r"decoy_rate: expected 0\.\.1, got nan"),
        ({"lookalike_rate": -1}, "lookalike_rate: expected at least 0, got -1"),
        ({"lookalike_rate": float("nan")}, "lookalike_rate: expected at least 0, got nan"),
        ({"question_rate": 0}, "question_rate: expected a positive number"),
        ({"needles_per_question": -1}, "needles_per_question: expected a positive number"),
        ({"min_hops": 3}, "expected 1 <= min_hops <= max_hops, got 3, 2"),
        ({"min_hops": 0}, "expected 1 <= min_hops <= max_hops, got 0, 2"),
        ({"min_distance": -1}, "min_distance: expected at least 0"),
        ({"text_positions": -1}, "text_positions: expected at least 0"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    stage()
    with pytest.raises(DRTError, match=message):
        stage(**changes)


def test_sources_that_do_not_fit_are_refused(byte_tokenizer: Any) -> None:
    text = Haystack(b"word " * 100, ("short.txt",))
    with pytest.raises(DRTError, match="at least one source"):
        NeedleMix([], byte_tokenizer)
    for weights in ([1, 2], [0], [-1], []):
        with pytest.raises(DRTError, match="weights: expected one for each of 1 sources"):
            NeedleMix([text], byte_tokenizer, weights)
    with pytest.raises(DRTError, match=r"\(short\.txt\) is too short: expected 640 tokens, got 500"):
        NeedleMix([text], byte_tokenizer).batch(0, stage(), seed=0)


def test_a_row_without_room_is_refused(mix: NeedleMix) -> None:
    with pytest.raises(DRTError, match="row_length 64 leaves no room"):
        mix.batch(0, stage(row_length=64, chain_share=1.0, min_hops=9, max_hops=9), seed=0)
