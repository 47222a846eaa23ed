"""Where a run's numbers go: metrics.jsonl and the terminal (TensorBoard has the Trainer's own callback)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drt.files import open_regular, write_text

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`, one JSON object a line, keyed by `step`.

    A run that goes on first writes the lines that its checkpoint knows of; later ones come again.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with what was logged up to here."""
        write_text(self.path, metrics_text(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line, unless it is the Trainer's closing summary."""
        if logs is not None and is_metrics(logs):
            line = _metrics_line({"step": state.global_step, **logs})
            with os.fdopen(open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
                file.write(line.encode("utf-8"))


def metrics_text(state: TrainerState) -> str:
    """The lines of a run's `metrics.jsonl` up to a state."""
    logged = [{"step": logs["step"], **logs} for logs in state.log_history if is_metrics(logs)]
    return "".join(map(_metrics_line, logged))


def _metrics_line(logs: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in logs.items() if name != "epoch"}) + "\n"


def is_metrics(logs: dict[str, Any]) -> bool:
    """Whether a log is of training or validation; the Trainer's closing summary is neither."""
    return "loss" in logs or is_validation(logs)


def is_validation(logs: dict[str, Any]) -> bool:
    """Whether a log is of a validation."""
    return "eval_score" in logs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out. No file: no lines."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Display(TrainerCallback):
    """A progress bar with the newest numbers on a terminal; elsewhere a line now and then.

    Args:
        console: where to print.
        stages: number of stages of the curriculum, if there is one.
    """

    def __init__(self, console: Console, stages: int = 1) -> None:
        self.console = console
        self.stages = stages
        self.stage = -1
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers; print stage changes and validation for good."""
        if logs is None or not is_metrics(logs):
            return
        if "loss" not in logs:
            shown = ", ".join(
                f"{name.removeprefix('eval_')} {value:.3f}" for name, value in logs.items() if name != "epoch"
            )
            self.console.print(f"step {state.global_step}: validation {shown}", highlight=False)
            return
        if "stage" in logs:
            text = (
                f"stage {logs['stage'] + 1}/{self.stages} loss {logs['loss']:.3f} "
                f"answer tokens {logs['answer_accuracy']:.1%} answers {logs['exact_match']:.1%} "
            )
        else:
            text = f"loss {logs['loss']:.3f} lr {logs['learning_rate']:.2e} "
        text += f"{logs['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.task, description=text)
        entered = logs.get("stage", 0) != self.stage
        self.stage = logs.get("stage", 0)
        if entered or not (self.console.is_terminal or state.global_step % (10 * args.logging_steps)):
            self.console.print(f"step {state.global_step}: {text}", highlight=False)

    def close(self) -> None:
        """Take the bar down, however training ended."""
        self.progress.stop()
