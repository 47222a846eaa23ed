"""Tables of a report on the terminal."""

from __future__ import annotations

from rich import table as rich_table
from rich.box import SIMPLE_HEAD

from drt.report.tables import Table


def to_rich(table: Table) -> rich_table.Table:
    """The same table for a console; its note stands below it."""
    shown = rich_table.Table(title=table.title, caption=table.note, box=SIMPLE_HEAD, caption_justify="left")
    for number, column in enumerate(table.columns):
        if number:
            shown.add_column(column, justify="right", no_wrap=True)
        else:
            shown.add_column(column, overflow="fold", min_width=12)
    for row in table.rows:
        shown.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in row))
    return shown
