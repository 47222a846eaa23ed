"""State of a run that must survive a restart: the stage of the curriculum and the running totals.

Both are callbacks with exported state, so the Trainer writes them into every checkpoint and restores them.
(It restores by building *new* callback objects: look them up through the trainer, never keep a reference.)
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from drt.train.config import StageConfig
from drt.train.loss import TOTALS


class Curriculum(TrainerCallback, ExportableState):
    """Which stage is being trained; goes on to the next one when the current one is mastered.

    The decision is taken at logging steps, on the answer-token accuracy of the interval just logged, so it
    costs no wait for the device.

    Args:
        stages: `StageConfig` fields as plain dicts (the Trainer writes them to JSON).
    """

    def __init__(self, stages: list[dict[str, Any]]) -> None:
        self.stages = [StageConfig(**stage) for stage in stages]
        self.stage = 0
        self.first_step = 0  # optimizer steps done when the stage began

    @property
    def current(self) -> StageConfig:
        """The stage that the next batch belongs to."""
        return self.stages[self.stage]

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: constructor arguments and attributes."""
        return {
            "args": {"stages": [dataclasses.asdict(stage) for stage in self.stages]},
            "attributes": {"stage": self.stage, "first_step": self.first_step},
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Enter the next stage if the logged interval says so."""
        if logs is None or "answer_accuracy" not in logs or self.stage + 1 == len(self.stages):
            return
        limit = self.current.max_steps
        over = limit is not None and state.global_step - self.first_step >= limit
        if over or logs["answer_accuracy"] >= self.current.threshold:
            self.stage += 1
            self.first_step = state.global_step


class RunningTotals(TrainerCallback, ExportableState):
    """Sums over the steps since the last log, kept on the device, and the seconds the run has taken so far.

    A checkpoint between two logs holds the partial sums, so that a resumed run logs, and decides, what an
    uninterrupted one would have.
    """

    def __init__(self) -> None:
        self.values = [0.0] * len(TOTALS)
        self.seconds = 0.0
        self._sums: Tensor | None = None
        self._tokens = 0
        self._interval_start = self._started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: constructor arguments and attributes."""
        return {"args": {}, "attributes": {"values": self._read(), "seconds": self.elapsed()}}

    def elapsed(self) -> float:
        """Wall seconds of the run, those before a restart included."""
        return self.seconds + time.perf_counter() - self._started

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of an interval at its first step: validation and saving are left out."""
        if self._tokens == 0:
            self._interval_start = time.perf_counter()

    def add(self, totals: Tensor, tokens: int) -> None:
        """Add one step's `NeedleLoss.totals` and its number of tokens."""
        if self._sums is None:
            self._sums = torch.tensor(self.values, dtype=torch.float64, device=totals.device)
        self._sums += totals
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Means since the last call, by the names they are logged under. Waits for the device."""
        sums = dict(zip(TOTALS, self._read(), strict=True))
        seconds = time.perf_counter() - self._interval_start
        tokens_per_second = self._tokens / max(seconds, 1e-9)
        self.values, self._sums, self._tokens = [0.0] * len(TOTALS), None, 0
        means = {name: sums[name] / sums["steps"] for name in ("loss", "answer_loss", "text_loss")}
        means["answer_accuracy"] = sums["answer_tokens_right"] / max(sums["answer_tokens"], 1.0)
        means["exact_match"] = sums["answers_right"] / max(sums["answers"], 1.0)
        if sums["chains"]:
            means["chain_exact_match"] = sums["chains_right"] / sums["chains"]
        return {**means, "tokens_per_second": tokens_per_second, "seconds": self.elapsed()}

    def _read(self) -> list[float]:
        return self.values if self._sums is None else self._sums.tolist()
