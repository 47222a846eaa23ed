"""Tokenizers by name, trained ones, and fingerprints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from drt.data.haystack import Haystack
from drt.data.tokenizer import (
    BYTES,
    describe_tokenizer,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from drt.errors import DRTError

TEXT = "Bücher: 一頁 😀\n\tnaïve |ab=12345|\r\n  x"


@pytest.fixture(scope="module")
def trained(books: Haystack) -> Any:
    return train_tokenizer([books.text.decode()], 400)


def test_a_trained_tokenizer_loses_nothing(trained: Any, books: Haystack) -> None:
    for text in (TEXT, books.text.decode()[:2000]):
        assert trained.decode(trained.encode(text, add_special_tokens=False)) == text
    assert len(trained) == 400
    assert (trained.pad_token_id, trained.eos_token_id) == (0, 1)
    assert len(trained.encode(books.text.decode(), add_special_tokens=False)) < 0.7 * len(books.text)


def test_a_saved_tokenizer_is_the_same(trained: Any, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    assert fingerprint(loaded) == fingerprint(trained)
    assert loaded.encode(TEXT) == trained.encode(TEXT)


def test_other_tokenizers_have_other_fingerprints(trained: Any, books: Haystack) -> None:
    others = [load_tokenizer("bytes"), train_tokenizer([books.text.decode()[:60_000]], 400)]
    assert len({fingerprint(tokenizer) for tokenizer in [trained, *others]}) == 3


def test_descriptions(trained: Any) -> None:
    described = describe_tokenizer(trained, "mine")
    assert described == {
        "name": "mine",
        "fingerprint": fingerprint(trained),
        "vocab_size": 400,
        "document_end": 1,
    }
    assert describe_tokenizer(load_tokenizer("bytes"), "bytes")["vocab_size"] == 259


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DRTError, match="expected at least 258, got 257"):
        train_tokenizer(["text"], 257)
    with pytest.raises(DRTError, match="expected 300 entries, but the text makes only 2"):
        train_tokenizer(["text"], 300)


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DRTError, match="expected bytes, a folder or a name on the Hugging Face hub"):
        load_tokenizer(str(tmp_path))


def test_all_of_them_pad_on_the_left(trained: Any, tmp_path: Path) -> None:
    """A batch of prompts is gone on with at its right end; also where the files say otherwise."""
    assert trained.padding_side == "left"
    other = copy.deepcopy(trained)
    other.padding_side = "right"
    save_tokenizer(other, tmp_path / "right")
    for name in (BYTES, str(tmp_path / "right")):
        assert load_tokenizer(name).padding_side == "left"


def test_a_vocabulary_beyond_memory_is_refused() -> None:
    with pytest.raises(DRTError, match="vocab_size: expected at most 1,048,576"):
        train_tokenizer(["a text"], 10**11)
