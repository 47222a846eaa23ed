"""Real text, and two tokenizers that cut it differently: bytes, and a small BPE trained on it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt.data.haystack import Haystack, sample_haystack


@pytest.fixture(scope="session")
def books() -> Haystack:
    return Haystack(sample_haystack().text[:120_000], ("books",))


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="session")
def bpe_tokenizer(books: Haystack) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(books.text.decode().splitlines(keepends=True)[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue("byte_tokenizer" if request.param == "bytes" else "bpe_tokenizer")
