"""Finished training runs: where their models lie, and what is written down of how they came to be."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from drt.errors import DRTError
from drt.eval.results import TrainingRecord
from drt.files import make_folder, read_json, write_text

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
        raise DRTError(f"{folder}: no such folder; expected one with training runs in it")
    runs = sorted(
        path for path in Path(folder).iterdir() if fnmatchcase(path.name, pattern) and path.is_dir()
    )
    finished = {path.name: path / FINAL_FOLDER for path in runs if (path / FINAL_FOLDER).is_dir()}
    if not finished:
        raise DRTError(
            f"{folder}: expected finished runs (folders {pattern} that hold {FINAL_FOLDER}), "
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
    make_folder(folder)
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
    found = _read_object(path)
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
    training, config = (_read_object(checkpoint / file) for file in (RECORD_FILE, "config.json"))
    try:
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
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DRTError(f"{path}: expected the record of a training: {error!r}") from error


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, follow=True)
    if not isinstance(values, dict):
        raise DRTError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
