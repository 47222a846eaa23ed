"""`drt report`: one page from evaluation records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drt.terminal import say


def report(
    records: Annotated[
        list[Path],
        typer.Argument(metavar="RECORDS...", help="Files of records, JSON lines, and folders of such files."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the page; made if it is missing.")
    ] = Path("report"),
    reference: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Model to compare language models with. Default: the best."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Where the position buckets of tables end.")
    ] = "2K,16K,64K,256K",
) -> None:
    """Write one page, as HTML and as Markdown, with the tables and figures that the records allow.

    Records are what `drt needle` and the commands of `drt eval` write; mix them freely. The paper's numbers stand
    beside what was found.

    Example:

        drt report results/books needle.jsonl -o report
    """
    from drt.cli.shared import parse_lengths
    from drt.errors import DRTError
    from drt.eval.results import EvaluationRecord, read_records
    from drt.report.page import build_page, write_page

    positions = sorted(set(parse_lengths("--lengths", lengths)))
    files: list[Path] = []
    for path in records:
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise DRTError(f"{path}: expected a folder with files of records (*.jsonl), got none")
        files += inside
    found = [record for file in files for record in read_records(file, EvaluationRecord)]
    blocks = build_page(found, reference=reference, positions=positions)
    for page in write_page(blocks, output):
        say(str(page))
