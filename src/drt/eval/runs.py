"""Finished training runs: where their models lie, and what is written down of how they came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drt.errors import DRTError
from drt.eval.results import TrainingRecord
from drt.files import write_text

FINAL_FOLDER = "final"
RECORD_FILE = "training.json"
SETTINGS_FILE = "settings.json"
TASK = "training"


def find_runs(folder: Path | str, pattern: str = "*") -> dict[str, Path]:
    """Trained models of the runs in a folder: name of the run -> its checkpoint folder, in the order of the names.

    Args:
        folder: holds one folder a run; a finished run has its model in `final`.
        pattern: of the names, such as `books-*`.

    Raises:
        DRTError: no such folder, or no finished run of such a name in it.
    """
    if not Path(folder).is_dir():
        raise DRTError(f"{folder}: no such folder; wanted one with training runs in it")
    runs = sorted(path for path in Path(folder).glob(pattern) if path.is_dir())
    finished = {path.name: path / FINAL_FOLDER for path in runs if (path / FINAL_FOLDER).is_dir()}
    if not finished:
        raise DRTError(
            f"{folder}: wanted finished runs (folders {pattern} that hold {FINAL_FOLDER}), "
            f"got {len(runs)} folders of such a name and none finished"
        )
    return finished


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for records of these settings, or go on in one that has them.

    Args:
        folder: of records.
        settings: plain values: what the records depend on.

    Raises:
        DRTError: the folder holds records of other settings, or cannot be written.
    """
    path = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, json.dumps(settings, indent=2) + "\n")
        found = _read_object(path)
    except (OSError, ValueError, TypeError) as error:
        raise DRTError(f"{path}: cannot be written and read: {error}") from error
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        shown = ", ".join(f"{name} {found.get(name)!r} there, {settings[name]!r} here" for name in other)
        raise DRTError(f"{folder} holds records of other settings ({shown}); choose another folder")


def training_record(checkpoint: Path, name: str) -> TrainingRecord | None:
    """What the training left beside its model; None where it left nothing.

    Args:
        checkpoint: folder of the model.
        name: of the model, for the record.

    Raises:
        DRTError: the files are damaged or lack what a training writes.
    """
    path = checkpoint / RECORD_FILE
    if not path.exists():
        return None
    try:
        training, config = (_read_object(checkpoint / file) for file in (RECORD_FILE, "config.json"))
        return TrainingRecord(
            task=TASK,
            checkpoint=name,
            device=str(training["machine"]["device"]),
            dtype=str(config.get("dtype")),
            architecture=str(config["model_type"]),
            parameters=int(training["parameters"]),
            seed=int(training["seed"]),
            steps=int(training["steps"]),
            training_tokens=int(training["tokens"]),
            seconds=float(training["wall_seconds"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DRTError(f"{path}: wanted the record of a training: {error!r}") from error


def _read_object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise TypeError(f"{path.name} holds no JSON object")
    return values
