"""Questions asked of an archive, several at once, with a record of every passage that was read for the answers."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError
from drt.eval.results import RetrievalRecord
from drt.eval.retrieval import Answer, RetrievalTrace, Selection
from drt.memory import Archive
from drt.models.common.devices import input_device
from drt.models.common.generation import PREFILL_CHUNK_SIZE
from drt.models.drt import DRTCache, DRTForCausalLM

CONVERSATION = "question and answer"  # the document of chunks that are not the archive's
CONTEXT_BYTES = 60  # shown before and after a passage


@torch.no_grad()
def ask(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    archive: Archive,
    questions: Sequence[str],
    max_new_tokens: int,
    **options: Any,
) -> list[Answer]:
    """Continue each question as the next text after all that an archive holds, which is neither changed nor copied.

    A question is continued verbatim: nothing is added before or after it. The shipped model, which finds needles,
    answers `|qx?` where a document holds `|qx=48213|`.

    Args:
        model: the one that read the archive's documents, in eval mode.
        tokenizer: that model's.
        archive: open.
        questions: at least one, none empty; they are answered in one batch.
        max_new_tokens: tokens of an answer at most.
        options: more for `model.generate`, such as ``do_sample=True``; `num_beams` is not wanted.

    Returns:
        An answer for each question, in their order.

    Raises:
        DRTError: no question, an empty one, or an archive of another model.
    """
    if not questions or not all(questions):
        raise DRTError("a question is empty; expected at least one character")
    codec = TextCodec(tokenizer)
    prompts = [codec.encode(question) for question in questions]
    cache = DRTCache.open(archive, model)
    cache.select_rows(torch.zeros(len(prompts), dtype=torch.long, device="cpu"))
    ids, mask = _left_padded(prompts, input_device(model))
    trace, closes = RetrievalTrace(cache), model.closes_prompt(options.get("close_prompt"))
    segment = max(
        PREFILL_CHUNK_SIZE // len(prompts), 1
    )  # whatever the checkpoint says: questions may be long
    sequences = model.generate(  # type: ignore[misc]
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([trace]),
        **{"do_sample": False, "pad_token_id": 0, "prefill_chunk_size": segment} | options,
    )
    answers = []
    for row, question in enumerate(questions):
        generated = _until_end(sequences[row, ids.shape[1] :].tolist(), model.generation_config.eos_token_id)
        bounds = _chunk_bounds(len(prompts[row]), len(generated), model.config.chunk_size, closes)
        passages = _Passages(archive, codec, prompts[row].tolist() + generated, bounds)
        common: dict[str, Any] = {
            "task": "retrieval",
            "checkpoint": archive.description.model_name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "index": row,
            "question": question,
            "answer": _text(codec.decode(generated)),
        }
        records = [
            RetrievalRecord(**common, **fields)
            for selection in trace.selections
            if selection.row == row
            for fields in _describe(selection, selection.columns - ids.shape[1], codec, generated, passages)
        ]
        answers.append(Answer(question, common["answer"], records))
    return answers


def _left_padded(prompts: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, longest) int64."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.from_numpy(prompt)
        mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until_end(token_ids: list[int], ends: int | list[int] | None) -> list[int]:
    """What was generated before the token that ends a text; a batch goes on until its last row ends."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return list(takewhile(lambda token: token not in stops, token_ids))


def _chunk_bounds(prompt: int, generated: int, chunk_size: int, closes: bool) -> list[int]:
    """Where chunks begin, and the last one ends, in a prompt and an answer of so many tokens."""
    first = prompt if closes else 0
    return [*range(0, first, chunk_size), *range(first, prompt + generated + chunk_size, chunk_size)]


def _describe(
    selection: Selection, step: int, codec: TextCodec, generated: list[int], passages: _Passages
) -> Iterator[dict[str, Any]]:
    """What a selection tells a record; nothing for one after the row's end."""
    if step > len(generated):
        return
    text = _text(codec.decode(generated[:step]))
    groups = zip(selection.chunk_indices.tolist(), selection.chunk_weights.tolist(), strict=True)
    for group, (chunks, weights) in enumerate(groups):
        for rank, (chunk, weight) in enumerate(zip(chunks, weights, strict=True)):
            if chunk >= 0:
                where = {"step": step, "generated": text, "group": group, "rank": rank}
                yield where | {"chunk": chunk, "weight": weight} | passages.find(chunk)


class _Passages:
    """Chunks as text: those of the archive, then those of a question and its answer.

    Args:
        archive: open.
        codec: of the model's tokenizer.
        tokens: of the question and its answer.
        bounds: where their chunks begin and end.
    """

    def __init__(self, archive: Archive, codec: TextCodec, tokens: list[int], bounds: list[int]) -> None:
        self.archive, self.codec = archive, codec
        self.tokens, self.bounds = tokens, bounds

    def find(self, chunk: int) -> dict[str, Any]:
        """The fields of a record that say what a chunk holds."""
        own = chunk - self.archive.num_chunks
        if own < 0:
            source = self.archive.source(chunk)
            name, whole, start, stop = (
                source.document.name,
                source.document.num_bytes,
                source.start,
                source.stop,
            )
            first = source.document.first_chunk
            last = first + source.document.num_chunks - 1
            before = self.archive.source(chunk - 1).text if chunk > first else b""
            after = self.archive.source(chunk + 1).text if chunk < last else b""
            pieces = before[-CONTEXT_BYTES:], source.text, after[:CONTEXT_BYTES]
        else:
            text = self.codec.decode(self.tokens)
            name, whole = CONVERSATION, len(text)
            start, stop = (len(self.codec.decode(self.tokens[:end])) for end in self.bounds[own : own + 2])
            pieces = text[:start][-CONTEXT_BYTES:], text[start:stop], text[stop:][:CONTEXT_BYTES]
        before_text, passage, after_text = _decode_pieces(pieces)
        return {
            "document": name,
            "document_bytes": whole,
            "start": start,
            "stop": stop,
            "passage": passage,
            "before": before_text,
            "after": after_text,
        }


def _decode_pieces(pieces: Sequence[bytes]) -> list[str]:
    """Decode consecutive pieces of a text; a character cut between two of them stands in the second."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) for piece in pieces]
    return [texts[0].lstrip("\ufffd"), *texts[1:]]


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
