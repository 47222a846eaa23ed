"""Which checkpoints are one model: training seeds of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

from drt.eval.results import EvaluationRecord
from drt.eval.runs import FINAL_FOLDER

RecordT = TypeVar("RecordT", bound=EvaluationRecord)
Models = Mapping[str, Sequence[RecordT]]  # name of a model -> records of all its checkpoints

_SEED = re.compile(r"[-_]s(eed)?[0-9]+$")


def run_name(checkpoint: str) -> str:
    """The run's name where the checkpoint is its `final` folder, else the checkpoint's own."""
    path = PurePath(checkpoint)
    return path.parent.name if path.name == FINAL_FOLDER and path.parent.name else checkpoint


def group_seeds(records: Sequence[RecordT]) -> dict[str, list[RecordT]]:
    """Records by model, in the order they came.

    Runs whose names differ only in an ending such as `-s0` or `-seed1` are seeds of one model. Checkpoints of
    different folders that have the same name are different models, and keep their whole paths as names.
    """
    checkpoints = dict.fromkeys(record.checkpoint for record in records)
    runs = [run_name(checkpoint) for checkpoint in checkpoints]
    names = {
        checkpoint: _SEED.sub("", run) if runs.count(run) == 1 else checkpoint
        for checkpoint, run in zip(checkpoints, runs, strict=True)
    }
    models: dict[str, list[RecordT]] = {}
    for record in records:
        models.setdefault(names[record.checkpoint], []).append(record)
    return models
