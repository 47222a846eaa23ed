"""State of a run that must survive a restart: the stage of the curriculum and the running totals.

Both are callbacks with exported state, so the Trainer writes them into every checkpoint and restores them.
(It restores by building *new* callback objects: look them up through the trainer, never keep a reference.)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from drt.train.config import StageConfig


class Curriculum(TrainerCallback, ExportableState):
    """Which stage is being trained; goes on to the next one when the current one is mastered.

    The decision is taken at logging steps, on the answer-token accuracy of the interval just logged, so it
    costs no wait for the device.

    Args:
        stages: fields of `stage_class` as plain dicts (the Trainer writes them to JSON).
    """

    stage_class: ClassVar[type[Any]] = StageConfig

    def __init__(self, stages: list[dict[str, Any]]) -> None:
        self.stages = [self.stage_class(**stage) for stage in stages]
        self.stage = 0
        self.first_step = 0  # optimizer steps done when the stage began

    @property
    def current(self) -> Any:
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
    uninterrupted one would have. With several processes each sums what it saw.

    Args:
        names: of the sums, in the order of `add`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.values = [0.0] * len(self.names)
        self.seconds = 0.0
        self._sums: Tensor | None = None
        self._tokens = 0
        self._interval_start = self._started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: constructor arguments and attributes."""
        attributes = {"values": self._read(), "seconds": self.elapsed()}
        return {"args": {"names": self.names}, "attributes": attributes}

    def elapsed(self) -> float:
        """Wall seconds of the run, those before a restart included."""
        return self.seconds + time.perf_counter() - self._started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint holds the sums of all processes: the first one goes on with them."""
        if not state.is_world_process_zero:
            self.values = [0.0] * len(self.names)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of an interval at its first step: validation and saving are left out."""
        if self._tokens == 0:
            self._interval_start = time.perf_counter()

    def add(self, totals: Tensor, tokens: int) -> None:
        """Add one step's totals (a float64 vector, on its device) and its number of tokens."""
        if self._sums is None:
            self._sums = torch.tensor(self.values, dtype=torch.float64, device=totals.device)
        self._sums += totals
        self._tokens += tokens

    def merge(self, reduce: Callable[[Tensor], Tensor], keep: bool) -> None:
        """Replace the sums by those over all processes, on the one that keeps them; the others begin anew.

        Args:
            reduce: adds a tensor up over all processes.
            keep: whether this process keeps them.
        """
        if self._sums is not None:
            merged = reduce(self._sums)
            self._sums = merged if keep else torch.zeros_like(merged)

    def peek(self) -> dict[str, float] | None:
        """This process' sums since the last log by name; None where there was no step. Waits for the device."""
        return None if self._sums is None else dict(zip(self.names, self._read(), strict=True))

    def take(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        """Sums over all processes since the last call by name, and this one's tokens a second. Waits for the device.

        Args:
            reduce: adds a tensor up over all processes.
        """
        if self._sums is not None:
            self._sums = reduce(self._sums)
        sums = dict(zip(self.names, self._read(), strict=True))
        seconds = time.perf_counter() - self._interval_start
        tokens_per_second = self._tokens / max(seconds, 1e-9)
        self.values, self._sums, self._tokens = [0.0] * len(self.names), None, 0
        return sums, tokens_per_second

    def _read(self) -> list[float]:
        return self.values if self._sums is None else self._sums.tolist()
