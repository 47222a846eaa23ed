"""Summaries that a model generates, scored with ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drt.data.summaries import SummaryPair, summary_prompt
from drt.data.tokens import TextCodec
from drt.errors import DRTError
from drt.eval.results import AnswerRecord
from drt.models.reading import read_and_generate

TASK = "summarization"
MEASURES = ("rouge1", "rouge2", "rougeLsum")


def evaluate_summaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SummaryPair],
    *,
    checkpoint: str,
    data: str,
    max_new_tokens: int = 256,
    segment_size: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[AnswerRecord]:
    """Summarise documents greedily and yield a record of each, with the F1 of ROUGE-1, ROUGE-2 and ROUGE-Lsum.

    ROUGE sees the decoded text, stems words, and takes the lines of a summary as its sentences. Whatever goes wrong
    in generation is an error, never an empty summary.

    Args:
        model: a causal language model in eval mode, on any device.
        tokenizer: the model's.
        pairs: documents with the summaries that are expected.
        checkpoint: name of the model, for the records.
        data: name of the data, for the records.
        max_new_tokens: longest summary.
        segment_size: tokens of one forward pass.
        on_progress: called with the number of tokens just read.

    Raises:
        DRTError: rouge-score is not installed.
        ValueError: a model in training mode or one that cannot generate.
    """
    scorer, codec = _scorer(), TextCodec(tokenizer)
    for index, pair in enumerate(pairs):
        prompt = torch.from_numpy(summary_prompt(pair, codec)).long()[None]
        found = read_and_generate(model, prompt, max_new_tokens, segment_size, on_progress)
        generated = cast(str, tokenizer.decode(found.token_ids[0], skip_special_tokens=True)).strip()
        scores = scorer.score(pair.summary, generated)
        yield AnswerRecord(
            task=TASK,
            checkpoint=checkpoint,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            data=data,
            index=index,
            length=prompt.shape[1],
            expected=[pair.summary],
            generated=generated,
            scores={measure: scores[measure].fmeasure for measure in MEASURES},
        )


def _scorer() -> Any:
    """ROUGE of the rouge-score package.

    Raises:
        DRTError: it is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DRTError(
            f'summaries are scored with rouge-score: pip install "drt-lm[rouge]" ({error})'
        ) from error
    return RougeScorer(list(MEASURES), use_stemmer=True)
