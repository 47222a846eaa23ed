"""The command as a user meets it: help, mistakes, Ctrl-C, a pipe that closes."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import drt
from drt.cli import app as cli
from drt.errors import DRTError, Interrupted

SLOW_IMPORTS = ("torch", "transformers", "matplotlib", "numpy", "datasets")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def modules_after(*arguments: str) -> list[str]:
    """Modules that `drt ARGUMENTS` had imported when it ended."""
    done = run_python(
        "import sys\n"
        "from drt.cli.app import main\n"
        f"sys.argv = ['drt', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_help_lists_every_command_and_imports_none_of_them() -> None:
    modules = modules_after("--help")
    assert not [name for name in cli.COMMANDS if f"drt.cli.{name}" in modules]
    assert not [name for name in SLOW_IMPORTS if name in modules]
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    for name, summary in cli.COMMANDS.items():
        assert name in shown
        assert summary in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_its_options_and_imports_nothing_slow(name: str) -> None:
    modules = modules_after(name, "--help")
    assert f"drt.cli.{name}" in modules
    assert not [slow for slow in SLOW_IMPORTS if slow in modules]
    loaded = cli.load_command(name)
    assert loaded.name == name
    assert loaded.help
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0
    for parameter in loaded.params:
        if parameter.param_type_name == "option":
            assert parameter.opts[-1] in result.output
            assert parameter.help


@pytest.mark.parametrize("command", [(), ("ask",), ("memory",), ("memory", "build"), ("eval", "runs")])
def test_h_is_help(command: tuple[str, ...]) -> None:
    shown = [CliRunner().invoke(cli.app, [*command, option]) for option in ("-h", "--help")]
    assert [result.exit_code for result in shown] == [0, 0]
    assert shown[0].output == shown[1].output


@pytest.mark.parametrize("module", ["drt", "drt.train"])
def test_python_m(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "-h"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "CONFIG" in done.stdout if module == "drt.train" else "needle" in done.stdout


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"drt {drt.__version__}\n")


def test_unknown_command_is_named() -> None:
    result = CliRunner().invoke(cli.app, ["trian"])
    assert result.exit_code == cli.MISTAKE
    assert "trian" in result.output


@pytest.fixture
def command_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `drt train` a command that raises an exception."""

    def install(error: BaseException) -> None:
        def train() -> None:
            raise error

        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(train=train))

    return install


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (DRTError("length 1Q: expected a number"), 2, "error: length 1Q: expected a number\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "error: a.txt: No such file\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (OSError("no space left"), 2, "error: no space left\n"),
        (Interrupted("run it again to go on"), 130, "\nrun it again to go on\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_the_user_can_put_right_is_one_line_without_a_traceback(
    command_that: Callable[[BaseException], None], error: BaseException, code: int, shown: str
) -> None:
    command_that(error)
    result = CliRunner().invoke(cli.app, ["train"])
    assert (result.exit_code, result.stderr, result.stdout) == (code, shown, "")


def test_a_defect_keeps_its_traceback(command_that: Callable[[BaseException], None]) -> None:
    command_that(ValueError("a defect"))
    result = CliRunner().invoke(cli.app, ["train"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("flush", [True, False], ids=["while it runs", "as it ends"])
def test_a_reader_that_leaves_ends_the_command_quietly(flush: bool) -> None:
    code = (
        "import sys, types\n"
        "from drt.cli import app as cli\n"
        "def train() -> None:\n"
        f"    print('text', flush={flush})\n"
        "cli.import_module = lambda name: types.SimpleNamespace(train=train)\n"
        "sys.argv = ['drt', 'train']\n"
        "sys.stdin.readline()\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before the command writes
    process.stdin.write(b"\n")
    process.stdin.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), complaint) == (1, b"")


def test_every_command_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: told.append(True))
    monkeypatch.setattr(sys, "argv", ["drt", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert told == [True]
