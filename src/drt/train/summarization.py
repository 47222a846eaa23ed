"""Fine-tuning on documents with summaries: its batches, its loss and its validation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from drt.data.summaries import CUE, IGNORED, SummaryPair, read_pairs, summary_batch
from drt.data.tokens import TextCodec
from drt.errors import DRTError
from drt.train.config import SummarizationConfig
from drt.train.curriculum import RunningTotals
from drt.train.held_out_loss import HeldOutLoss
from drt.train.trainer import Batch, RunTrainer, process_settings, training_arguments

TOTALS = ("tokens", "loss")
_STREAM = zlib.crc32(b"summaries")  # keeps the order apart from other uses of the same seed


class SummarizationTrainer(RunTrainer):
    """Trains on the summaries of documents; every token of every summary in a step has the same weight.

    Args:
        config: the run.
        model: a causal language model; `chunk_ends` is passed to its forward. It ends a text with the tokenizer's end
            token from now on.
        tokenizer: the model's.
        callbacks: further callbacks.
        check_interrupt: called between the passes of a validation; may raise KeyboardInterrupt.

    Raises:
        DRTError: a file is missing, damaged or without the fields, a summary is too long for a row, the tokenizer has
            no end token, or the rows of a step cannot be shared evenly.
    """

    config: SummarizationConfig

    def __init__(
        self,
        config: SummarizationConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        end = tokenizer.eos_token_id
        if end is None:
            raise DRTError(
                f"init_from {config.init_from}: its tokenizer has no end token, which ends a summary"
            )
        model.config.eos_token_id = end
        if model.generation_config is not None:
            model.generation_config.eos_token_id = end
        self.make_batch = SummaryBatchMaker(config, TextCodec(tokenizer), end)
        self.pairs = self.make_batch.read(config.data.train)
        args = training_arguments(config, bool(config.eval_every), **process_settings(config))
        self.passes = args.gradient_accumulation_steps = config.passes_per_step(args.world_size)
        validate = None
        if config.eval_every:
            held_out = self.make_batch.read(config.data.validation)[: config.data.validation_pairs]
            if len(held_out) % args.world_size:
                raise DRTError(
                    f"data.validation_pairs: expected a multiple of {args.world_size} processes, got {len(held_out)}"
                )
            mine = held_out[args.process_index :: args.world_size]
            validate = HeldOutLoss(
                len(mine),
                lambda first, last: self.make_batch(mine[first:last]),
                config.rows_per_pass or max(1, config.rows_per_step // args.world_size),
                self._autocast,
                check_interrupt,
            )
        super().__init__(config, model, tokenizer, TOTALS, validate, callbacks, args)
        if validate is not None:
            validate.reduce = self.sum_over_processes

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.compute_loss_context_manager()

    def batches(self) -> Iterator[Batch]:
        """The rows of each pass; together all processes see the same rows of a step, whatever their number."""
        step, rank, world_size = self.state.global_step, self.args.process_index, self.args.world_size
        rows = self.config.rows_per_step // self.passes
        while True:
            for number in range(step * self.passes, (step + 1) * self.passes):
                chosen = range(number * rows + rank, (number + 1) * rows, world_size)
                yield self.make_batch([self.pair_at(place) for place in chosen])
            step += 1

    def pair_at(self, place: int) -> SummaryPair:
        """The pair at a place of the whole run's order: each one once an epoch, in an order of the epoch's own."""
        epoch, index = divmod(place, len(self.pairs))
        return self.pairs[_order(self.config.seed, epoch, len(self.pairs))[index]]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pass' share in the mean loss over all tokens of the step's summaries.

        Args:
            num_items_in_batch: those tokens, over all passes and processes, as the Trainer counts them.
        """
        assert num_items_in_batch is not None  # the Trainer counts what has labels
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        scored = (inputs["labels"] != IGNORED).sum()
        totals = torch.stack([scored, outputs.loss.detach() * num_items_in_batch]).double()
        self.find_callback(RunningTotals).add(totals, inputs["input_ids"].numel())
        loss = outputs.loss * self.args.world_size  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean loss of a token of a summary."""
        return {"loss": sums["loss"] / sums["tokens"]}


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """(count,) numbers of the pairs in the order of an epoch."""
    return np.random.default_rng([seed, _STREAM, epoch]).permutation(count)


class SummaryBatchMaker:
    """Callable (pairs) -> batch: `input_ids` and `labels` (B, L) int64, `chunk_ends` (B, L) bool.

    Args:
        config: the run.
        codec: of the model's tokenizer.
        end: token that ends a summary.
    """

    def __init__(self, config: SummarizationConfig, codec: TextCodec, end: int) -> None:
        self.data = config.data
        self.codec = codec
        self.end = end

    def __call__(self, pairs: list[SummaryPair]) -> Batch:
        """A batch of a row a pair."""
        return summary_batch(pairs, self.codec, longest=self.data.sequence_length, end=self.end)

    def read(self, path: str) -> list[SummaryPair]:
        """The pairs of a file, each of which fits a row.

        Raises:
            DRTError: a file that cannot be read or lacks the fields, a summary that leaves no room for its document.
        """
        pairs = read_pairs(path, self.data.document_field, self.data.summary_field)
        room = (
            self.data.sequence_length - len(self.codec.encode(CUE)) - 2
        )  # the end, and a token of the document
        for line, pair in enumerate(pairs, start=1):
            length = len(self.codec.encode(pair.summary))
            if length > room:
                raise DRTError(
                    f"{path}, line {line}: expected a summary of at most {room} tokens, for a row of "
                    f"data.sequence_length = {self.data.sequence_length}; it has {length}"
                )
        return pairs
