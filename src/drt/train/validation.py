"""Validation in training: needles in long texts that the model was not trained on, answered by generating.

Accuracy on the training mix does not foretell accuracy at length, so the checkpoint is selected by this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drt.data.haystack import load_haystack
from drt.data.needles import is_correct, make_sample
from drt.data.tokens import Tokenizer
from drt.errors import DRTError
from drt.models.reading import read_and_generate
from drt.train.config import TrainConfig


class NeedleValidation:
    """Callable (model) -> metrics; the samples are made once and are the same for the same configuration.

    Metrics: `task_length`, the share of each task's samples at each length whose every answer token is right;
    `exact_match`, their mean; `score`, by which checkpoints are compared: `exact_match`, and among equals the mean
    probability of the right answer.

    Args:
        config: the run; its validation section says what is asked.
        tokenizer: of the model.
        check_interrupt: called after every segment; may raise KeyboardInterrupt.

    Raises:
        DRTError: a validation haystack is missing or shorter than a length.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer, check_interrupt: Callable[[], None]
    ) -> None:
        plan = config.validation
        haystack = load_haystack(config.data.validation_haystack)
        self.segment_size = plan.segment_size
        self.check_interrupt = check_interrupt
        try:
            self.samples = [
                make_sample(
                    task, tokenizer, haystack, length, (index + 0.5) / plan.samples, config.seed, index
                )
                for length in plan.lengths
                for task in plan.tasks
                for index in range(plan.samples)
            ]
        except DRTError as error:
            raise DRTError(f"validation.lengths, data.validation_haystack: {error}") from error

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Let a model in eval mode answer every sample."""
        right: dict[str, list[bool]] = {}
        probability = 0.0
        for sample in self.samples:
            answer = torch.from_numpy(sample.answer_ids).long()
            generated = read_and_generate(
                model,
                torch.from_numpy(sample.input_ids).long()[None],
                len(answer),
                self.segment_size,
                on_segment=lambda _: self.check_interrupt(),
            )
            is_right = is_correct(sample, generated.token_ids[0].tolist())
            right.setdefault(f"{sample.task}_{sample.length}", []).append(is_right)
            probability += answer_probability(answer, generated.token_ids[0].cpu(), generated.logits[0].cpu())
        exact_match = sum(map(sum, right.values())) / len(self.samples)
        return {
            "score": exact_match
            + probability / len(self.samples) ** 2,  # the second term is below one sample's share
            "exact_match": exact_match,
            **{name: sum(values) / len(values) for name, values in right.items()},
        }


def answer_probability(answer: Tensor, generated: Tensor, logits: Tensor) -> float:
    """Probability of the answer's tokens, up to and with the first that was not generated.

    What a greedy answer's logits say after its first mistake is about another text, so it is left out.

    Args:
        answer: (n,) token ids.
        generated: (m,) token ids, m <= n.
        logits: (m, V), row i before token i was chosen.
    """
    count = len(generated)
    before_mistake = (generated == answer[:count]).long().cumprod(0)
    judged = min(int(before_mistake.sum()) + 1, count)
    chosen = logits.float().log_softmax(-1)[torch.arange(judged, device=logits.device), answer[:judged]]
    return float(chosen.sum().exp())
