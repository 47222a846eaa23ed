"""What several subcommands need: where to run, in which numbers, and a bar while a long text is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from drt.errors import DRTError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        DRTError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DRTError(f"--device: wanted auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DRTError(f"--device: got {name}, but PyTorch sees {torch.cuda.device_count()} GPUs here")
    return device


def choose_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name, None for None.

    Raises:
        DRTError: neither float32 nor bfloat16.
    """
    import torch

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise DRTError(f"--dtype: wanted float32 or bfloat16, got {name!r}")
    return dtypes[name]


class TokensColumn(ProgressColumn):
    """Tokens read, of how many, and how fast."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        shown = f"{task.completed:,.0f} of {task.total or 0:,.0f} tokens"
        return Text(shown if speed is None else f"{shown}, {speed:,.0f} tokens/s")


def reading_progress() -> Progress:
    """A bar on stderr that counts tokens read; nothing where stderr is no terminal. Tasks have a description."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("reading"),
        BarColumn(),
        TokensColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
