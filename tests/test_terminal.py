"""What reaches a terminal and what reaches a pipe, and how programs end when something cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from drt.terminal import one_line, visible

HOSTILE = "a\x1b[31m\x07\x9b2J\u202e\x00\r.é[bold]:smile:\t|"
NAMES = f"""
from drt.terminal import PlainConsole, print_table, program, say
name = {HOSTILE!a}
with program():
"""
SAY = NAMES + "    say(name)\n    say('bytes that are no UTF-8: ' + '\\udcff')\n"
WARNING = NAMES + "    import logging; logging.getLogger('drt.x').warning('%s', name)\n"
TABLE = (
    NAMES + "    print_table(('name', 'number'), [(name, '1'), ('x' * 300, '22')], title=name, note=name)\n"
)
CONSOLE = (
    NAMES
    + """
    from rich.progress import Progress, TextColumn
    console = PlainConsole(stderr=True)
    console.print(name)
    with Progress(TextColumn('{task.description}', markup=False), console=console) as progress:
        progress.add_task(name)
    raise KeyError
"""
)


def run(
    code: str, environment: Mapping[str, str] = {}, **streams: object
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "PYTHONUNBUFFERED": ""} | environment,
        check=False, timeout=60, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )  # fmt: skip


def on_terminal(code: str, environment: Mapping[str, str] = {}) -> bytes:
    """What a terminal gets from standard output and standard error."""
    ours, theirs = os.openpty()
    try:
        run(code, environment, stdin=theirs, stdout=theirs, stderr=theirs)
    finally:
        os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    return shown


@pytest.mark.parametrize("code", [SAY, TABLE, CONSOLE, WARNING], ids=["say", "table", "console", "warning"])
def test_a_terminal_gets_pictures_of_control_characters(code: str) -> None:
    shown = on_terminal(code)
    lost = "␇␍" if code is CONSOLE else ""  # rich drops them
    assert "a␛[31m␇�2J�␀␍.é[bold]:smi".translate(dict.fromkeys(map(ord, lost))).encode() in shown
    for acting in ("\x1b[31m", "\x07", "\x9b", "\u202e", "\x00"):
        assert acting.encode() not in shown.split(b"Traceback")[0]


@pytest.mark.parametrize("code", [SAY, TABLE, CONSOLE], ids=["say", "table", "console"])
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_an_ascii_terminal_gets_escapes(code: str, environment: dict[str, str]) -> None:
    shown = on_terminal(code, environment).split(b"Traceback")[0]
    assert b"a\\u241b[31m" in shown
    assert b"\\xe9[bold]" in shown
    assert shown.isascii()
    assert b"UnicodeEncodeError" not in shown


@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_pipe_gets_exact_bytes(environment: dict[str, str]) -> None:
    done = run(SAY, environment)
    assert done.stdout == HOSTILE.encode() + b"\nbytes that are no UTF-8: \xff\n"
    title, head, first, second, note = run(TABLE, environment).stdout.split(b"\n")[:-1]
    assert title == note == HOSTILE.encode()
    assert head.split() == [b"name", b"number"]
    assert first.startswith(HOSTILE.encode())
    assert second.split() == [b"x" * 300, b"22"]
    assert (first.decode().rstrip().endswith(" 1"), len(second)) == (True, 308)


@pytest.mark.parametrize("code", [SAY, TABLE], ids=["say", "table"])
def test_a_full_disk_is_named(code: str) -> None:
    with open("/dev/full", "wb") as full:
        done = run(code, stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        b"error: standard output: cannot be written: No space left on device\n",
    )


def test_print_is_flushed_and_a_full_disk_is_named() -> None:
    code = "from drt.terminal import program\nwith program():\n    print('text')\n"
    with open("/dev/full", "wb") as full:
        done = run(code, stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"error: standard output")


def test_closed_streams_are_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec {sys.executable} -c "$1" >&- 2>&-', "sh", SAY + TABLE], check=False
    )
    assert done.returncode == 0


def test_a_line_stays_a_line_and_nothing_else_changes() -> None:
    text = "a\nb\tc\r\x0b\x0c\x1c\x1e\x85\u2028\u2029\x1b\\"
    assert one_line(text) == "a␊b␉c␍␋␌␜␞␤␤␤\x1b\\"
    assert len(one_line(text).splitlines()) == 1
    assert visible("a\nb\tc") == "a\nb\tc"
    assert visible("a\nb\tc\u2028", line=True) == "a␊b␉c␤"
    assert visible("\ud800\udcff") == "��"
