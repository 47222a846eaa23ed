"""Ctrl-C in training: finish the step, save, stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class BetweenSteps(KeyboardInterrupt):
    """Ctrl-C that `Interrupt.check` passed on: no step is half done, so the run can be saved."""


class Interrupt(TrainerCallback):
    """While entered, the first Ctrl-C asks training to save and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """For long work between steps, such as validation.

        Raises:
            BetweenSteps: if Ctrl-C was pressed.
        """
        if self.requested:
            raise BetweenSteps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, with a checkpoint and without validation, which is made up for on going on."""
        if self.requested:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
