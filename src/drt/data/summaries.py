"""Documents with their summaries: read from JSON lines, laid out for generation and for fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drt.data.json_rows import json_rows, text_field_of
from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

CUE = "\n\nSummary: "  # between a document and its summary
IGNORED = -100  # label of a position that is not scored


@dataclass(frozen=True)
class SummaryPair:
    """A document and its summary, as text."""

    document: str
    summary: str


def read_pairs(
    path: Path | str, document_field: str = "document", summary_field: str = "summary"
) -> list[SummaryPair]:
    """Read a file of JSON lines (plain, .xz or .gz), one pair a line.

    Args:
        path: the file.
        document_field: name of the field with the document, such as `article` in CNN-DailyMail.
        summary_field: name of the field with the summary, such as `highlights` there.

    Raises:
        DRTError: the file cannot be read or is empty, or a line has no such fields or empty ones; names the line.
    """
    pairs = []
    for where, row in json_rows(path):
        document, summary = (text_field_of(row, field, where) for field in (document_field, summary_field))
        if not document.strip() or not summary.strip():
            raise DRTError(f"{where}: expected texts that are not empty")
        pairs.append(SummaryPair(document, summary))
    if not pairs:
        raise DRTError(f"{path}: expected documents with summaries, got an empty file")
    return pairs


def summary_prompt(pair: SummaryPair, codec: TextCodec, longest: int | None = None) -> TokenIds:
    """(T,) token ids: the document, its end cut off where the prompt would be longer than `longest`, and the cue.

    Raises:
        ValueError: `longest` has no room for the cue and one token.
    """
    cue = codec.encode(CUE)
    document = codec.encode(pair.document)
    if longest is not None:
        if longest <= len(cue):
            raise ValueError(f"longest must be more than the {len(cue)} tokens of the cue, got {longest}")
        document = document[: longest - len(cue)]
    return np.concatenate([document, cue])


def summary_batch(
    pairs: Sequence[SummaryPair], codec: TextCodec, *, longest: int, end: int, padding: int = 0
) -> dict[str, Tensor]:
    """A batch for fine-tuning: the loss is on the summary and its end alone.

    The chunk closes where the prompt ends, as it does when a summary is generated.

    Args:
        pairs: B of them.
        codec: of the model's tokenizer.
        longest: most tokens of a row; documents are cut to fit, summaries are kept whole.
        end: token that ends a text.
        padding: token behind shorter rows, where causality makes it harmless.

    Returns:
        `input_ids` (B, L) int64, `labels` (B, L) aligned with them (`IGNORED` where nothing is scored), and
        `chunk_ends` (B, L) bool.

    Raises:
        ValueError: no pairs, or a summary that leaves no room for its document.
    """
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    answers = [np.append(codec.encode(pair.summary), np.int32(end)) for pair in pairs]
    prompts = [
        summary_prompt(pair, codec, longest - len(answer))
        for pair, answer in zip(pairs, answers, strict=True)
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(pairs), length), padding, device="cpu")
    labels = torch.full_like(input_ids, IGNORED)
    chunk_ends = torch.zeros(input_ids.shape, dtype=torch.bool, device="cpu")
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        input_ids[row, :stop] = torch.from_numpy(np.concatenate([prompt, answer])).long()
        labels[row, len(prompt) : stop] = input_ids[row, len(prompt) : stop]
        chunk_ends[row, len(prompt) - 1] = True
    return {"input_ids": input_ids, "labels": labels, "chunk_ends": chunk_ends}
