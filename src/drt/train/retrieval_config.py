"""Sections of a run that teaches a language model to use its chunk memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from drt.data.retrieval_mix import RetrievalMixConfig

_OWN = ("row_length", "min_distance")


@dataclass(frozen=True, kw_only=True)
class RetrievalDataConfig:
    """Text and questions.

    Args:
        corpus: folder, as `drt data prepare` makes it with the model's tokenizer; rows are cut from its train split,
            validation rows from its validation split.
        questions: files of questions about passages, see `drt.data.questions.read_passages`; may be empty.
        validation_questions: the same for validation.
        workers: processes that make batches ahead of the step at hand; 0: the training process makes them.
        verify: compare every file of the corpus with its checksum before training.
    """

    corpus: str
    questions: list[str] = field(default_factory=list)
    validation_questions: list[str] = field(default_factory=list)
    workers: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class RetrievalStageConfig:
    """One stage of the curriculum.

    Args:
        row_length: tokens of a row.
        min_distance: a question comes at least so many tokens after what answers it: more than the window, so that it
            cannot be answered from there.
        sliding_window: window of the attention in this stage; null: the model's.
        mix: other fields of `RetrievalMixConfig`.
        threshold: the next stage starts when this share of the answer tokens of facts was right over a logging
            interval.
        max_steps: the next stage starts after so many steps at the latest; null: only by the threshold.
    """

    row_length: int
    min_distance: int
    sliding_window: int | None = None
    mix: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.85
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in _OWN:
            if name in self.mix:
                raise ValueError(f"mix.{name}: not allowed here, give it as the stage's {name}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1, got {self.sliding_window}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: expected 0 < threshold <= 1, got {self.threshold}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")
        try:
            self.rows()
        except TypeError as error:
            raise ValueError(f"mix: {error}") from error

    def rows(self) -> RetrievalMixConfig:
        """What the rows of this stage are made of."""
        return RetrievalMixConfig(row_length=self.row_length, min_distance=self.min_distance, **self.mix)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank changes of the base's linear layers instead of all of its weights.

    Args:
        rank: of each change; 0: no adapter, the base's weights themselves are trained.
        alpha: the change is scaled by alpha / rank; null: twice the rank.
    """

    rank: int = 0
    alpha: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank: expected at least 0, got {self.rank}")
        if self.alpha is not None and self.alpha < 1:
            raise ValueError(f"alpha: expected at least 1, got {self.alpha}")
