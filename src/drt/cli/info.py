"""`drt info`: what a training run will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drt.terminal import print_table


def info(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in `drt train`.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs or processes that share the run.")] = 1,
) -> None:
    """Show parameters, operations and memory of a training run before anything is spent.

    Operations are those of the mathematics (the convention of MFU). Memory of activations is measured on the CPU with
    a short row and scaled to the run's rows: kernels of a GPU keep less.
    """
    from drt.train.config import RowsConfig, load_config
    from drt.train.estimate import estimate_run

    run = load_config(config, overrides or ())
    found = estimate_run(run, processes)
    share = processes if isinstance(run, RowsConfig) and run.sharding == "fsdp" else 1
    facts = (
        ("model", str(run.model.get("model_type", "drt"))),
        ("parameters", f"{found.parameters:,} ({found.embedding_parameters:,} in the embedding)"),
        ("tokens", f"{found.tokens:,} ({run.max_steps:,} steps of {run.tokens_per_step:,})"),
        ("FLOPs a token, forward and backward", f"{found.flops_per_token:.3e}"),
        ("FLOPs in all", f"{found.total_flops:.3e}"),
        ("weights, gradients, optimizer", f"{found.state_bytes / share / 2**30:.2f} GiB a process"),
        (
            f"activations of a pass ({found.rows_per_pass} x {found.row_length:,} tokens)",
            f"{found.activation_bytes / 2**30:.2f} GiB a process",
        ),
    )
    print_table(("", ""), facts, left=(0, 1))
