"""What several subcommands need: where to run, in which numbers, and a bar while a long text is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from drt.errors import DRTError, naming
from drt.files import check_output, open_regular
from drt.terminal import PlainConsole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from drt.eval.results import EvaluationRecord
    from drt.memory import Archive

RecordT = TypeVar("RecordT", bound="EvaluationRecord")


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
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DRTError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
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
        raise DRTError(f"--dtype: expected float32 or bfloat16, got {name!r}")
    return dtypes[name]


def parse_length(option: str, text: str) -> int:
    """Tokens of an option such as `--segment-size 64K`.

    Raises:
        DRTError: it is no length; names the option.
    """
    from drt.data import needles

    with naming(option):
        return needles.parse_length(text)


def parse_lengths(option: str, text: str) -> tuple[int, ...]:
    """Tokens of an option that takes a list such as `4K,64K`; raises as `parse_length`."""
    return tuple(parse_length(option, part) for part in text.split(","))


class LoadedModel(NamedTuple):
    """A model on its device, in eval mode, its tokenizer, and what records and archives call it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_checkpoint(checkpoint: Path | None, device: str, dtype: str | None = None) -> LoadedModel:
    """Load a checkpoint for the options --checkpoint (None: the one that ships), --device and --dtype.

    Raises:
        DRTError: the device or the dtype is unknown, or the folder holds no model that can be loaded.
    """
    from drt.models.loading import load_model, shipped_checkpoint

    target = choose_device(device)
    folder = shipped_checkpoint() if checkpoint is None else checkpoint
    model, tokenizer = load_model(folder, choose_dtype(dtype))
    name = folder.name if checkpoint is None else str(checkpoint)
    return LoadedModel(model.to(target), tokenizer, name)  # type: ignore[arg-type]


def open_archive(folder: Path, loaded: LoadedModel, search: str) -> Archive:
    """Open an archive for reading; ``search``: of the option --search.

    Raises:
        DRTError: no archive, one that is damaged or unfinished, or one that another model or tokenizer made; another
            search.
    """
    from drt.memory.archive import SEARCHES, Archive

    if search not in SEARCHES:
        raise DRTError(f"--search: expected {', '.join(SEARCHES[:-1])} or {SEARCHES[-1]}, got {search!r}")
    archive = Archive.open(folder)
    archive.search = search
    check_maker(loaded, archive)
    return archive


def check_maker(loaded: LoadedModel, archive: Archive) -> None:
    """Make sure that a model and its tokenizer are those that made an archive.

    Raises:
        DRTError: they are not.
    """
    from drt.models.drt.archive_check import check_archive

    check_archive(archive, loaded.model, loaded.tokenizer)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path] = ()) -> None:
    """Make sure that files can be written before hours go into what they shall hold; makes their folders.

    Args:
        outputs: option -> its file, or None where it is not given.
        inputs: files that the command reads, and folders of which it reads any file.

    Raises:
        DRTError: a file of two options, or one that is also read; a link, device, pipe or folder in the way, no
            permission.
    """
    read = {path.resolve() for path in inputs}
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        target = path.resolve()
        if read.intersection((target, *target.parents)):
            raise DRTError(f"{option} {path}: expected a file apart from what is read, got one of it")
        other = taken.setdefault(target, option)
        if other != option:
            raise DRTError(f"{option} {path}: expected a file of its own, got that of {other}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_output(path)
            if path.exists():
                os.close(open_regular(path, os.O_WRONLY))
            tempfile.TemporaryFile(dir=path.parent).close()
        except DRTError as error:
            raise DRTError(f"{option} {error}") from error
        except OSError as error:
            raise DRTError(f"{option} {path}: cannot be written: {error.strerror}") from error


def write_records(path: Path, records: Iterable[RecordT]) -> list[RecordT]:
    """Write each record as it comes, and return them all; what the file held stays until the first one is there.

    Raises:
        DRTError: the file cannot be written; whatever `records` raises.
    """
    from drt.eval.results import RecordWriter

    waiting = iter(records)
    written = list(islice(waiting, 1))  # a mistake shows here, before the file is begun anew
    with RecordWriter(path) as writer:
        for record in written:
            writer.write(record)
        for record in waiting:
            writer.write(record)
            written.append(record)
    return written


class TokensColumn(ProgressColumn):
    """Tokens read, of how many, and how fast."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        whole = "" if task.total is None else f" of {task.total:,.0f}"
        shown = f"{task.completed:,.0f}{whole} tokens"
        return Text(shown if speed is None else f"{shown}, {speed:,.0f} tokens/s")


def reading_progress() -> Progress:
    """A bar on stderr that counts tokens read; nothing where stderr is no terminal. Tasks have a description."""
    console = PlainConsole(stderr=True)
    return Progress(
        TextColumn("reading"),
        BarColumn(),
        TokensColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def bytes_progress(doing: str) -> Progress:
    """A bar on stderr that counts bytes; nothing where stderr is no terminal."""
    console = PlainConsole(stderr=True)
    return Progress(
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
