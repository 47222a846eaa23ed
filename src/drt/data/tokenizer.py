"""Tokenizers by name, a BPE trained on a corpus, and what tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drt.errors import DRTError
from drt.files import check_inputs, fill_folder, read_json

PADDING_SIDE = "left"  # a batch of prompts is continued at its right end
BYTES = "bytes"
# Ids as the model's configuration has them by default (and as bytes have them): padding 0, end of a document 1.
PAD, DOCUMENT_END = "<pad>", "<eos>"

# What the classes of the library make a list of before anything else is looked at.
_COUNTS = ("extra_ids", "offset")
_MOST_EXTRA_TOKENS = 2**16
_LARGEST_VOCABULARY = 2**20  # to train: memory for all of it is taken at once

# What the fingerprint sees of merges and of the splitting into words: prose, code, numbers, spaces, other scripts.
_PROBE = (
    "It was the best of times; we'd read 1,234 chunks in 0.05 s, hadn't we?  \tif (p->next != NULL) {\n"
    "\t\treturn -EINVAL; /* 0xdeadbeef */\n\t}\r\n#define MAX_LEN 1<<20\nfor i in range(10): print(f'{i}')\n"
    "naïve café — “quoted” 一頁 😀 παράδειγμα пример"
)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, its end token and the ids of a text of many kinds.

    Files are not compared: the same tokenizer saved by two versions of a library is the same.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    seen = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        list(tokenizer.encode(_PROBE, add_special_tokens=False)),
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def describe_tokenizer(tokenizer: Any, name: str) -> dict[str, Any]:
    """The manifest's entry: `name`, `fingerprint`, `vocab_size` (ids are below it) and `document_end`."""
    return {
        "name": name,
        "fingerprint": fingerprint(tokenizer),
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "document_end": tokenizer.eos_token_id,
    }


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer; nothing is downloaded.

    Args:
        name: `bytes`, a folder with a tokenizer's files, or the name of a model on the Hugging Face hub whose files
            are in the local cache already.

    Raises:
        DRTError: there is none of that name, or it cannot be read.
    """
    from transformers import ByT5Tokenizer

    if name == BYTES:
        return ByT5Tokenizer(extra_ids=0, padding_side=PADDING_SIDE)
    try:
        return read_tokenizer(name)
    except DRTError as error:
        raise DRTError(
            f"tokenizer {name!r}: expected {BYTES}, a folder or a name on the Hugging Face hub that was downloaded "
            f"before (hf download {name}): {error}"
        ) from error


def read_tokenizer(source: Path | str) -> Any:
    """A Hugging Face tokenizer from files that may come from a stranger: none of their code runs, no network is used.

    Args:
        source: a folder, or a name in the local cache of the Hugging Face hub.

    Raises:
        DRTError: the files cannot be read, or the tokenizer wants code of its own.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        _check_files(Path(source))
    try:
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=True, padding_side=PADDING_SIDE
        )
    # The library trusts that the JSON files hold what they should, and its parser of tokenizer.json raises Exception.
    except Exception as error:
        raise DRTError(f"{source}: {error or type(error).__name__}") from error


def _check_files(folder: Path) -> None:
    """Refuse what the library would wait for, or take all memory for.

    Raises:
        DRTError: a file is none, or counts more extra tokens than any tokenizer has.
    """
    check_inputs(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path, follow=True) if path.is_file() else {}
    for name in _COUNTS if isinstance(settings, dict) else ():
        if isinstance(count := settings.get(name), int) and count > _MOST_EXTRA_TOKENS:
            raise DRTError(f"{path}: {name} must be at most {_MOST_EXTRA_TOKENS:,}, got {count:,}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE: it gives every text back exactly, and needs no unknown token.

    Args:
        texts: pieces of text; all of it is seen once, and counted in memory.
        vocab_size: entries, padding (id 0), the end of a document (id 1) and the 256 bytes included.

    Returns:
        A Hugging Face tokenizer.

    Raises:
        DRTError: the vocabulary has no room for the bytes, or the texts do not make so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + 2
    if vocab_size < least:
        raise DRTError(f"vocab_size: expected at least {least}, got {vocab_size}")
    if vocab_size > _LARGEST_VOCABULARY:
        raise DRTError(f"vocab_size: expected at most {_LARGEST_VOCABULARY:,}, got {vocab_size:,}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DRTError(f"vocab_size: expected {vocab_size} entries, but the text makes only {found}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=DOCUMENT_END,
        clean_up_tokenization_spaces=False,
        padding_side=PADDING_SIDE,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files into a folder; errors as `fill_folder`."""
    with fill_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
