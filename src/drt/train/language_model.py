"""Next-token prediction on a corpus: its batches, its loss and its validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from drt.data.corpus import Corpus, open_corpus
from drt.data.sampling import WindowSampler
from drt.data.tokenizer import fingerprint
from drt.errors import DRTError
from drt.models.cost import peak_flops, training_flops
from drt.train.config import LanguageModelConfig
from drt.train.curriculum import RunningTotals
from drt.train.held_out_loss import HeldOutLoss
from drt.train.trainer import Batch, RunTrainer, process_settings, training_arguments

TOTALS = ("passes", "loss")


class LanguageModelTrainer(RunTrainer):
    """Trains on rows of a corpus.

    Args:
        config: the run.
        model: a causal language model.
        tokenizer: of the corpus, saved beside the model.
        callbacks: further callbacks.
        check_interrupt: called between the passes of a validation; may raise KeyboardInterrupt.

    Raises:
        DRTError: the corpus is missing, damaged, of another tokenizer or shorter than one row; the rows of a step
            cannot be shared evenly.
    """

    config: LanguageModelConfig

    def __init__(
        self,
        config: LanguageModelConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        data, made_with = config.data, fingerprint(tokenizer)
        corpus = open_corpus(data.corpus, "train", fingerprint=made_with, verify=data.verify)
        needed = corpus.manifest.tokenizer["vocab_size"]
        if model.config.vocab_size < needed:
            raise DRTError(
                f"model.vocab_size: expected the corpus' {needed} or more, got {model.config.vocab_size}"
            )
        self.sampler = WindowSampler(
            corpus, data.sequence_length, config.seed, inside_documents=data.inside_documents
        )
        args = training_arguments(config, bool(config.eval_every), **process_settings(config))
        self.passes = args.gradient_accumulation_steps = config.passes_per_step(args.world_size)
        validate = None
        if config.eval_every:
            held_out = open_corpus(data.corpus, "validation", fingerprint=made_with, verify=data.verify)
            starts = validation_rows(config, held_out, args.process_index, args.world_size)
            validate = HeldOutLoss(
                len(starts),
                lambda first, last: _rows(held_out, starts[first:last], data.sequence_length),
                config.rows_per_pass or max(1, config.rows_per_step // args.world_size),
                self._autocast,
                check_interrupt,
            )
        super().__init__(config, model, tokenizer, TOTALS, validate, callbacks, args)
        self._flops_per_token = training_flops(model.config, data.sequence_length)
        if validate is not None:
            validate.reduce = self.sum_over_processes

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.compute_loss_context_manager()

    def batches(self) -> Iterator[Batch]:
        """The rows of each pass; together all processes see the same rows of a step, whatever their number."""
        step = self.state.global_step
        world_size = self.args.world_size
        rows = self.config.rows_per_step // self.passes
        while True:
            for number in range(step * self.passes, (step + 1) * self.passes):
                ids = self.sampler.rows(number, rows, self.args.process_index, world_size)
                yield {"input_ids": torch.from_numpy(ids)}
            step += 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of the pass; added to the running totals."""
        ids = inputs["input_ids"]
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        loss = outputs.loss
        totals = torch.stack([torch.ones_like(loss), loss]).detach().double()
        self.find_callback(RunningTotals).add(totals, ids.numel())
        return (loss, outputs) if return_outputs else loss

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean loss over all passes of all processes."""
        return {"loss": sums["loss"] / sums["passes"]}

    def speed(self, tokens_per_second: float) -> dict[str, float]:
        """Tokens a second, and the share of the devices' peak (MFU) where that is known."""
        speed = super().speed(tokens_per_second)
        peak = peak_flops(self.args.device)
        if peak is not None:
            speed["mfu"] = tokens_per_second * self._flops_per_token / (peak * self.args.world_size)
        return speed


def validation_rows(config: LanguageModelConfig, corpus: Corpus, rank: int, world_size: int) -> list[int]:
    """Where the rows of a process begin: spread evenly over the validation split, and the same for every model.

    Raises:
        DRTError: the split is shorter than one row, or the rows cannot be shared evenly.
    """
    length, rows = config.data.sequence_length, config.data.validation_sequences
    available = corpus.num_tokens // length
    if available == 0:
        raise DRTError(
            f"{config.data.corpus}, validation: shorter than one sequence: expected {length} tokens, "
            f"it has {corpus.num_tokens}"
        )
    if rows % world_size:
        raise DRTError(
            f"data.validation_sequences: expected a multiple of the {world_size} processes, got {rows}"
        )
    return [index * available // rows * length for index in range(rows)][rank::world_size]


def _rows(corpus: Corpus, starts: list[int], length: int) -> Batch:
    """Rows of a corpus that begin at given tokens, all of their tokens to be predicted."""
    rows = [corpus.tokens(start, start + length).astype(np.int64) for start in starts]
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids, "labels": ids}
