"""From the needle mix to what the trainer's loss wants."""

from __future__ import annotations

import torch

from drt.data.haystack import load_haystack
from drt.data.needle_mix import NeedleMix
from drt.data.tokens import Tokenizer
from drt.errors import DRTError
from drt.train.config import StageConfig, TrainConfig, mix_config
from drt.train.trainer import Batch


class BatchMaker:
    """Callable (step, stage) -> batch; a batch depends on the configuration and on nothing else.

    A batch holds `input_ids` (B, L) int64, `chunk_ends`, `answer_mask` and `chain_mask` (B, L) bool, and what is found
    here on the host, so that no step has to wait for the device to count: `scored` (N,) int64, the flat positions of
    the tokens in the loss; `logits_to_keep` (n,), the columns that predict one of them in some row; `predicted_by`
    (N,), the flat position in (B, n) of each one's prediction.

    Args:
        config: the run.
        tokenizer: of the model.

    Raises:
        DRTError: a haystack is missing, or the weights do not fit.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        sources = [load_haystack([path]) for path in config.data.haystack]
        self.mix = NeedleMix(sources, tokenizer, config.data.weights)

    def __call__(self, step: int, stage: StageConfig) -> Batch:
        """The batch of a step."""
        try:
            mixed = self.mix.batch(step, mix_config(self.config, stage), self.config.seed)
        except DRTError as error:
            raise DRTError(f"curriculum.{self.config.curriculum.index(stage)}.chunks: {error}") from error
        scored = torch.from_numpy(mixed.answer_mask | mixed.text_mask).flatten().nonzero().flatten()
        length = mixed.input_ids.shape[1]
        columns, place = ((scored - 1) % length).unique(return_inverse=True)
        return {
            "input_ids": torch.from_numpy(mixed.input_ids),
            "chunk_ends": torch.from_numpy(mixed.chunk_ends),
            "answer_mask": torch.from_numpy(mixed.answer_mask),
            "chain_mask": torch.from_numpy(mixed.chain_mask),
            "scored": scored,
            "logits_to_keep": columns,
            "predicted_by": scored // length * len(columns) + place,
        }
