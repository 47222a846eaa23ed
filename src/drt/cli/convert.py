"""`drt convert`: make a checkpoint of the paper's authors loadable here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drt.terminal import say


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="AUTHORS_CHECKPOINT",
            help="File of parameters (.safetensors, .bin, .pt), or a folder that holds one. Pickled code never runs.",
        ),
    ],
    config: Annotated[Path, typer.Option(metavar="JSON", help="The authors' configuration of that model.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the converted checkpoint.")
    ],
) -> None:
    """Convert a checkpoint of the paper's authors to this package's architecture.

    The folder is written with `save_pretrained`. To use it with drt generate, save the tokenizer that the model was
    trained with into the same folder. Groups of upper layers may differ in size, as in "decoder_layers": [1, 1, 2].

    Example:

        drt convert model.safetensors --config config.json -o converted
    """
    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    from transformers.utils import logging

    from drt.models.drt.convert import convert_authors_checkpoint

    logging.disable_progress_bar()
    model = convert_authors_checkpoint(checkpoint, config, output)
    say(f"{output}: {model.num_parameters():,} parameters", error=True)
