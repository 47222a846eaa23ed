"""Text on standard output and standard error: control characters shown on a terminal, exact bytes anywhere else."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from drt.errors import DRTError, reason

MISTAKE = 2  # exit code for what the user can put right; also what typer and argparse use for a wrong option
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

_WIDEST = 1000  # characters of a table that is wider than the terminal
_REPLACEMENT = "\ufffd"
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421"}
# What else acts on a terminal or a page: C1 controls, letters that turn the direction of writing, lone surrogates.
_ACTING = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_LINE_VISIBLE = (
    _PICTURES | dict.fromkeys(_ACTING, _REPLACEMENT) | {0x85: "\u2424", 0x2028: "\u2424", 0x2029: "\u2424"}
)
_TEXT_VISIBLE = {code: shown for code, shown in _LINE_VISIBLE.items() if code not in (9, 10, 0x2028, 0x2029)}
_ONE_LINE = {code: _LINE_VISIBLE[code] for code in (*range(9, 14), *range(0x1C, 0x1F), 0x85, 0x2028, 0x2029)}
_NO_BYTE = re.compile(
    "[\ud800-\udc7f\udd00-\udfff]"
)  # surrogates that stand for no byte that could not be decoded


def visible(text: str, *, line: bool = False) -> str:
    """Text whose control characters are pictures of them (`␛`), as many characters as before.

    Args:
        text: any; lone surrogates are replaced too, so that the result can be encoded.
        line: for a name or anything else that must stay on one line: line ends and tabs are shown as well.
    """
    return text.translate(_LINE_VISIBLE if line else _TEXT_VISIBLE)


def one_line(text: str) -> str:
    """Text whose line ends and tabs are pictures of them; everything else is as it was."""
    return text.translate(_ONE_LINE)


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Write to standard output, or standard error: to a terminal what is `visible`, to anything else the exact text.

    Elsewhere than on a terminal it is UTF-8 whatever the locale says, and bytes of names that were no UTF-8 are those
    bytes again. On a terminal, characters that its encoding lacks become escapes.

    Raises:
        DRTError: standard output cannot be written, such as to a full disk.
        BrokenPipeError: who read it has left.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed by whoever started the program
        return
    if stream.isatty():
        content = visible(text + end).encode(stream.encoding, "backslashreplace")
    else:
        content = _NO_BYTE.sub(_REPLACEMENT, text + end).encode("utf-8", "surrogateescape")
    with _writing(stream):
        stream.flush()
        while content:  # a stream without a buffer (python -u) may take less than all
            content = content[stream.buffer.write(content) :]
        stream.buffer.flush()


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    note: str = "",
    left: Sequence[int] = (0,),
    bold: Iterable[tuple[int, int]] = (),
) -> None:
    """Write a table to standard output: fitted to a terminal; elsewhere one line a row, however long.

    Args:
        columns: heads; all empty: no line for them.
        rows: as many cells as there are columns.
        title: a line above.
        note: a line below.
        left: numbers of the columns that are aligned to the left, others to the right.
        bold: row and column of cells that stand out on a terminal.
    """
    if sys.stdout is None:
        return
    listed = [tuple(row) for row in rows]
    if sys.stdout.isatty():
        _print_fitted(columns, listed, title, note, left, set(bold))
        return
    lines = [tuple(columns), *listed] if any(columns) else listed
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    shown = [title] if title else []
    for cells in lines:
        padded = []
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            padding = " " * (width - cell_len(cell))
            last = number == len(cells) - 1
            padded.append(padding + cell if number not in left else cell if last else cell + padding)
        shown.append("  ".join(padded))
    say("\n".join([*shown, note] if note else shown))


class PlainConsole(Console):
    """A rich console for progress and messages that takes text as it is: no markup, no emoji, no highlighting, no
    wrapping of lines; control characters in it are shown."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of something, as rich asks for them."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can put right, and Ctrl-C, into a line on standard error and an exit code (`SystemExit`)."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        message, code = f"\n{str(interrupt) or 'interrupted'}", INTERRUPTED
    except DRTError as error:
        message, code = f"error: {error}", MISTAKE
    except BrokenPipeError:
        raise  # whoever read the output has left (`| head`): no news to anyone
    except OSError as error:
        named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        message, code = f"error: {named}{reason(error)}", MISTAKE
    else:
        return
    with suppress(DRTError, OSError):  # there is nowhere left to say that standard error cannot be written
        say(message, error=True)
    raise SystemExit(code)


@contextmanager
def program() -> Iterator[None]:
    """What surrounds a whole program: streams that any text can be written to, plain errors and warnings, a quiet end
    of a pipe."""
    logging.basicConfig(handlers=[_Warnings()], level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with plain_errors():
            try:
                yield
            finally:
                if sys.stdout is not None:
                    with _writing(sys.stdout):
                        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(1) from None


class _Warnings(logging.Handler):
    """Says what is logged, names of files and all, as everything else is said."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(DRTError, OSError):
            say(self.format(record), error=True)


@contextmanager
def _writing(stream: IO[str]) -> Iterator[None]:
    """Give up a stream that cannot be written: Python would try again as it exits, and complain."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        name = "standard output" if stream is sys.stdout else "standard error"
        raise DRTError(f"{name}: cannot be written: {reason(error)}") from error


def _print_fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str,
    note: str,
    left: Sequence[int],
    bold: set[tuple[int, int]],
) -> None:
    """A table on a terminal: names are folded, numbers never; where they do not fit, the table is wider than it."""
    table = Table(title=Text(visible(title)) if title else None, box=SIMPLE_HEAD, show_header=any(columns))
    for number, column in enumerate(columns):
        is_name = number in left
        table.add_column(
            Text(visible(column, line=True)),
            justify="left" if is_name else "right",
            no_wrap=not is_name,
            overflow="fold",
            min_width=12 if is_name else None,
        )
    for row, cells in enumerate(rows):
        styles = ("bold" if (row, number) in bold else "" for number in range(len(cells)))
        table.add_row(
            *(Text(visible(cell, line=True), style) for cell, style in zip(cells, styles, strict=True))
        )
    console = PlainConsole()
    least = console.measure(table, options=console.options.update(max_width=_WIDEST)).minimum
    PlainConsole(width=max(console.width, least)).print(table)
    if note:
        say(note)
