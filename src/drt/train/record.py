"""What made a checkpoint: the record that lies beside it."""

from __future__ import annotations

import json
import os
import platform
import shlex
from importlib import metadata

import torch
from transformers import PreTrainedModel

from drt.machine import processor_name
from drt.train.config import RunConfig, config_to_dict

RECORD_FILE = "training.json"


def training_record(
    config: RunConfig,
    command: list[str],
    model: PreTrainedModel,
    *,
    steps: int,
    exported_step: int,
    seconds: float,
    device: str,
) -> str:
    """A JSON text: command, configuration, seed, versions, machine, wall time, steps and tokens.

    `tokens` is what the steps had room for, at most: rows may be shorter than their limit, and a stage's rows seldom
    fill a step.
    """
    record = {
        "command": shlex.join(command),
        "seed": config.seed,
        "steps": steps,
        "exported_step": exported_step,
        "tokens": steps * config.tokens_per_step,
        "parameters": model.num_parameters(),
        "wall_seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("drt-lm", "torch", "transformers", "numpy")},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": processor_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        },
        "config": config_to_dict(config),
    }
    return json.dumps(record, indent=2) + "\n"


def _version(name: str) -> str | None:
    """Version of an installed distribution; None when it runs from a source tree."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
