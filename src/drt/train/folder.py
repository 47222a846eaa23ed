"""The folder of a run: one process at a time, one configuration, and nothing left of a start that failed."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drt.errors import DRTError, reason
from drt.files import FileLock, lock_file, write_text
from drt.train.checkpoints import checkpoint_folder, find_fault, list_checkpoints
from drt.train.config import RunConfig, config_to_dict
from drt.train.logs import METRICS_FILE

CONFIG_FILE = "config.yaml"
FINAL_FOLDER = "final"
LOCK_FILE = "train.lock"
TENSORBOARD_FOLDER = "tensorboard"


class RunFolder(TrainerCallback):
    """While entered, the run's folder is this process' own; it is made, and the configuration is in it.

    A start that fails before its first step leaves the disk as it found it: the folders and files that were made for it
    are removed. As a callback it learns of the first step.

    Args:
        config: the run.

    Raises:
        DRTError: on entering: the folder cannot be written, another process trains in it, or it holds another
            configuration's run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.output_dir)
        self._config = config
        self._made: list[Path] = []
        self._begun = False
        self._lock: FileLock | None = None

    def __enter__(self) -> RunFolder:
        lock = self.path / LOCK_FILE
        self._made = [path for path in [lock, self.path, *self.path.parents] if not os.path.lexists(path)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
            self._lock = lock_file(
                lock,
                f"output_dir {self.path}: another process is training there; wait for it, or choose another output_dir",
            )
            others = [self.path / name for name in (CONFIG_FILE, METRICS_FILE, TENSORBOARD_FOLDER)]
            self._made = [path for path in others if not os.path.lexists(path)] + self._made
            claim(self.path, self._config)
        except OSError as error:
            self._leave(failed=True)
            raise DRTError(
                f"output_dir {self.path}: expected a folder that can be written: {reason(error)}"
            ) from error
        except BaseException:
            self._leave(failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(failed=kind is not None)

    def _leave(self, failed: bool) -> None:
        """Let the folder go; what was made for a start that failed is removed, the innermost first."""
        if failed and not self._begun and not holds_run(self.path):
            for path in self._made:
                with suppress(OSError):  # a folder that another process has put something into stays
                    if path.name == TENSORBOARD_FOLDER:
                        shutil.rmtree(path)
                    elif path.is_dir():
                        path.rmdir()
                    elif self._lock is not None:
                        path.unlink()
        if self._lock is not None:
            self._lock.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on the folder stays."""
        self._begun = True


def claim(output_dir: Path, config: RunConfig) -> None:
    """Write a run's configuration into its folder; if that holds a run, check that it is the same.

    A start that failed before the first checkpoint leaves no run, so that the corrected configuration can follow.

    Raises:
        DRTError: the folder holds another configuration's run, or one whose configuration is missing or damaged.
    """
    values = config_to_dict(config)
    path = output_dir / CONFIG_FILE
    if not holds_run(output_dir):
        write_text(path, yaml.safe_dump(values, sort_keys=False))
        return
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise _of_another(output_dir, f"{CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise _of_another(output_dir, f"{CONFIG_FILE} is damaged")
    there, here = _flatten(stored), _flatten(values)
    differing = [key for key in {**there, **here} if key != "output_dir" and there.get(key) != here.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        raise _of_another(output_dir, shown)


def _flatten(values: Any, path: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists by their dotted keys."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{path}.{key}" if path else str(key)
        flat |= _flatten(value, name) if isinstance(value, dict | list) and value else {name: value}
    return flat


def _of_another(output_dir: Path, reason: str) -> DRTError:
    return DRTError(
        f"output_dir {output_dir} holds a run of another configuration ({reason}); choose another output_dir or "
        "delete that folder"
    )


def holds_run(output_dir: Path) -> bool:
    """Whether a folder holds a run's checkpoints, whole or not, or its trained model."""
    return bool(list_checkpoints(output_dir)) or (output_dir / FINAL_FOLDER).exists()


def find_resume_point(output_dir: Path, console: Console) -> Path | None:
    """The newest whole checkpoint, None for a fresh start; says what is skipped, a line each."""
    for folder in reversed(list_checkpoints(output_dir)):
        fault = find_fault(folder)
        if fault is None:
            console.print(f"going on from {folder}")
            return folder
        console.print(f"{folder} {fault}: skipped", soft_wrap=True, markup=False, highlight=False)
    return None


class BestCheckpoint(TrainerCallback):
    """Forgets the best checkpoint by validation where it is damaged or gone, so that the best of the others counts.

    Args:
        console: where to say so.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what the checkpoint that training goes on from calls the best."""
        if state.best_global_step is None or state.best_global_step == state.global_step:
            return
        folder = checkpoint_folder(Path(str(args.output_dir)), state.best_global_step)
        if fault := find_fault(folder):
            self.console.print(
                f"{folder}, the best so far by validation, {fault}: skipped, the best from here on will be exported"
            )
            state.best_global_step = state.best_metric = state.best_model_checkpoint = None
