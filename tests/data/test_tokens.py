"""Text to token ids and back: the shortcut for bytes is the tokenizer's own answer, and BPE loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from drt.data import tokens
from drt.data.haystack import Haystack
from drt.data.tokenizer import train_tokenizer
from drt.data.tokens import TextCodec

TEXT = "Bücher: 一頁 😀\n\tnaïve |ab=12345|"


class CountingTokenizer:
    """Bytes, but from 4 on, and 0 before every text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0, *(byte + 4 for byte in text.encode())]

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token - 4 for token in token_ids if token).decode()


@pytest.mark.parametrize("extra_ids", [0, 125])
def test_byte_tokenizers_are_recognised(extra_ids: int) -> None:
    assert TextCodec(ByT5Tokenizer(extra_ids=extra_ids)).is_bytes


def test_other_tokenizers_are_not_taken_for_bytes(bpe_tokenizer: Any) -> None:
    assert not TextCodec(bpe_tokenizer).is_bytes
    assert not TextCodec(CountingTokenizer()).is_bytes


def test_ids_are_the_tokenizers(tokenizer: Any) -> None:
    codec = TextCodec(tokenizer)
    expected = tokenizer.encode(TEXT, add_special_tokens=False)
    for text in (TEXT, TEXT.encode()):
        ids = codec.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected
    assert codec.decode(ids) == codec.decode(expected) == TEXT.encode()


def test_no_text_is_no_token(tokenizer: Any) -> None:
    codec = TextCodec(tokenizer)
    assert codec.encode("").shape == codec.encode(b"").shape == (0,)
    assert codec.decode([]) == b""


def test_any_bytes_come_back(byte_tokenizer: Any) -> None:
    codec = TextCodec(byte_tokenizer)
    everything = bytes(range(256))
    assert codec.decode(codec.encode(everything)) == everything
    assert codec.decode([0, 1, 2, 68]) == b"A"  # special tokens are no text


def test_text_that_names_a_special_token_stays_text(byte_tokenizer: Any, books: Haystack) -> None:
    assert byte_tokenizer.encode("</s>", add_special_tokens=False) == [1]
    assert TextCodec(byte_tokenizer).encode("</s>").tolist() == [byte + 3 for byte in b"</s>"]
    trained = train_tokenizer([books.text[:20_000].decode()], 300)
    assert trained.encode("<eos><pad>", add_special_tokens=False) == [1, 0]
    codec = TextCodec(trained)
    ids = codec.encode("an <eos> and a <pad>")
    assert min(ids) > 1
    assert codec.decode(ids) == b"an <eos> and a <pad>"


def test_a_long_line_is_cut_between_words_or_else_between_characters(
    bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE", 100)
    words = "a line of words 😀 " * 50
    pieces = list(tokens.text_pieces([words.encode()]))
    assert max(map(len, pieces)) <= 200
    assert all(piece.startswith(b" ") for piece in pieces[1:])
    assert TextCodec(bpe_tokenizer).encode(words).tolist() == bpe_tokenizer.encode(words)
    for text in ("€" * 200, "x" * 450, "\n" * 500, "x" * 99 + "\n"):
        blocks = [text.encode()[start : start + 7] for start in range(0, len(text.encode()), 7)]
        pieces = list(tokens.text_pieces(blocks))
        assert "".join(piece.decode() for piece in pieces) == text
        assert max(map(len, pieces)) <= 200


def test_half_characters_at_the_ends_are_dropped_where_tokens_are_no_bytes(bpe_tokenizer: Any) -> None:
    codec = TextCodec(bpe_tokenizer)
    assert codec.decode(codec.encode("é".encode()[1:] + b"middle" + "😀".encode()[:3])) == b"middle"


def test_long_texts_are_encoded_in_pieces_and_lose_nothing(
    bpe_tokenizer: Any, books: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = books.text[:20_000].decode()
    whole = TextCodec(bpe_tokenizer).encode(text)
    sizes = []
    encode = bpe_tokenizer.encode
    monkeypatch.setattr(tokens, "_PIECE", 1000)
    monkeypatch.setattr(
        bpe_tokenizer, "encode", lambda text, **options: sizes.append(len(text)) or encode(text, **options)
    )
    codec = TextCodec(bpe_tokenizer)
    sizes.clear()
    pieces = codec.encode(text)
    assert codec.decode(pieces) == text.encode()
    assert len(pieces) - len(whole) <= len(sizes)  # a border may part what one token joined
    assert 5 < len(sizes) <= 20
    assert max(sizes) < 2000  # a piece ends with a line


def test_a_continuation_is_what_follows_in_the_joint_encoding(bpe_tokenizer: Any) -> None:
    codec = TextCodec(bpe_tokenizer)
    joint = codec.encode("the house").tolist()
    head = codec.encode("the").tolist()
    assert codec.encode_continuation("the", " house").tolist() == joint[len(head) :]
    # `he` is one token, so that `e` after `h` cannot be cut out of the joint encoding.
    assert len(codec.encode("he")) == 1
    assert codec.encode_continuation("h", "e").tolist() == codec.encode("e").tolist()


def test_a_continuation_of_bytes_is_its_bytes(byte_tokenizer: Any) -> None:
    codec = TextCodec(byte_tokenizer)
    assert codec.encode_continuation("|ab?", "12345").tolist() == codec.encode("12345").tolist()
