"""`drt train`: one training run from one YAML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from drt.terminal import PlainConsole, say


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run; see configs/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key: optimizer.lr=1e-3, curriculum.0.chunks=8."
        ),
    ] = None,
) -> None:
    """Train a model from one YAML file: a language model, needle questions hidden in real text, or summaries.

    The run lives in the file's output_dir: checkpoints, metrics.jsonl, TensorBoard logs, config.yaml and, at
    the end, the model in `final`. Run the same command again after a stop and it goes on from the newest
    checkpoint. Ctrl-C finishes the step, saves a checkpoint and exits with code 130.
    """
    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    from drt.train.config import load_config
    from drt.train.run import run_training

    console = PlainConsole(stderr=True)
    final = run_training(load_config(config, overrides or ()), ["drt", *sys.argv[1:]], console)
    say(f"the trained model is in {final}", error=True)
