"""What the tests of whole runs share: a run that collects its losses, and ways to stop it."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from drt.train.config import TrainConfig
from drt.train.run import run_training

MakeConfig = Callable[..., TrainConfig]


class Killed(Exception):
    """Stands for SIGKILL: nothing of drt's catches it, so nothing is tidied up."""


class Run:
    """Runs a configuration, collecting the loss of every step; `before_step[n]` is called before step n."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.stages: dict[int, int] = {}
        self.before_step: dict[int, Callable[[], None]] = {}
        self.output = io.StringIO()

    def __call__(self, config: TrainConfig) -> Path:
        return run_training(config, ["drt", "train", "run.yaml"], Console(file=self.output, width=200))


def kill() -> None:
    raise Killed


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def comparable(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")}


class BestAfter:
    """Stands for the validation: of the steps 4, 8 and 12 one is the best; `before[n]` is called at step n first."""

    def __init__(self, run: Run, best: int) -> None:
        self.run = run
        self.best = best
        self.before: dict[int, Callable[[], None]] = {}

    def __call__(self, config: TrainConfig, tokenizer: object, check: Callable[[], None]):
        def validate(model: object) -> dict[str, float]:
            step = max(self.run.losses) + 1
            self.before.get(step, lambda: None)()
            check()
            return {"score": -abs(step - self.best)}

        return validate
