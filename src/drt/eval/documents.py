"""The documents that an evaluation reads whole: of a corpus, or text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from drt.data.corpus import MANIFEST, open_corpus
from drt.data.sources import Source, read_documents
from drt.data.tokenizer import fingerprint
from drt.data.tokens import BYTE_OFFSET, TextCodec
from drt.errors import DRTError

TokenIds = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Document:
    """One text.

    Attributes:
        name: of the document.
        index: its number in the data that it is from, from 0.
        tokens: (T,) token ids.
    """

    name: str
    index: int
    tokens: TokenIds


def load_documents(
    data: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "test",
    shortest: int = 2,
    longest: int | None = None,
    count: int | None = None,
) -> list[Document]:
    """Documents in the data's own order, so that every model reads the same.

    Args:
        data: a corpus folder, which is memory-mapped, or a file as `drt.data.sources.Source` takes it: a text, which
            is one document, or JSON lines.
        tokenizer: the model's.
        split: of a corpus.
        shortest: leave out documents of fewer tokens. One token alone predicts nothing.
        longest: cut documents to this many tokens. None: they are read whole.
        count: take the first so many of them. None: all.

    Raises:
        DRTError: no such data, a corpus of another tokenizer or without that split, damaged files, no document of
            that length.
    """
    path = Path(data)
    if (path / MANIFEST).is_file():
        corpus = open_corpus(path, split, fingerprint=fingerprint(tokenizer))
        lengths = corpus.document_lengths
        chosen = [index for index in range(len(corpus)) if lengths[index] >= max(shortest, 2)][:count]
        documents = [Document(corpus.names[i], i, corpus.document(i)[:longest]) for i in chosen]
    elif path.is_dir():
        raise DRTError(f"{path} is no corpus: it has no {MANIFEST}. `drt data prepare` makes one of a folder")
    else:
        documents = list(_read_texts(data, tokenizer, max(shortest, 2), longest, count))
    if not documents:
        raise DRTError(f"{path}: expected documents of at least {max(shortest, 2)} tokens, got none")
    return documents


def _read_texts(
    data: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    shortest: int,
    longest: int | None,
    count: int | None,
) -> Iterator[Document]:
    codec = TextCodec(tokenizer)
    texts = enumerate(read_documents(Source(path=str(data))))
    encoded = ((index, text.name, codec.encode(text.text)) for index, text in texts)
    long_enough = (
        Document(name, index, ids[:longest]) for index, name, ids in encoded if len(ids) >= shortest
    )
    return islice(long_enough, count)


class ByteCounter:
    """Counts the UTF-8 bytes that tokens stand for; special tokens, such as the end of a document, have none.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._codec = TextCodec(tokenizer)
        self._special = np.array(sorted(tokenizer.all_special_ids), np.int64)

    def count(self, tokens: TokenIds) -> int:
        """Bytes of the text of (T,) tokens."""
        if self._codec.is_bytes:
            return int((tokens >= BYTE_OFFSET).sum())
        kept = tokens[~np.isin(tokens, self._special)]
        return len(self._codec.decode(kept.astype(np.int32)))

    def count_between(self, tokens: TokenIds, ends: list[int]) -> list[int]:
        """Bytes between neighbours of ascending `ends`; their sum is that of the whole, whatever is cut in two.

        A character whose tokens lie on both sides of an end counts where it is completed.
        """
        before = [self.count(tokens[:end]) for end in ends]
        return [int(n) for n in np.diff(before)]
