"""The `drt` command and what its subcommands share: registration, errors, Ctrl-C.

A subcommand is a module of this package that defines a function (or, for a command with subcommands of its own, a
`typer.Typer` with a callback) of the module's name, and a line in `COMMANDS`. The module is imported when its command
is asked for, so `drt --help` stays fast; it imports torch and other slow things inside its function for the same
reason.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import drt
from drt.machine import keep_freed_memory
from drt.terminal import INTERRUPTED, MISTAKE, plain_errors, program, say

__all__ = ["COMMANDS", "INTERRUPTED", "MISTAKE", "app", "load_command", "main"]

COMMANDS = {
    "needle": "Find needles in texts of any length.",
    "eval": "Evaluate models: perplexity, needles, benchmarks, summaries.",
    "report": "Write one page from evaluation records.",
    "generate": "Continue a text of any length.",
    "memory": "Read documents once and keep the memory of them.",
    "ask": "Ask questions of a memory.",
    "upcycle": "Give a pretrained language model a chunk memory.",
    "convert": "Convert a checkpoint of the paper's authors.",
    "train": "Train a model from one YAML file.",
    "info": "Show what a training run will take.",
    "data": "Fetch and prepare texts to train and evaluate on.",
}


class Commands(TyperGroup):
    """The group of subcommands: summaries for `drt --help`, the module itself once a command is asked for."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update({name: TyperCommand(name, help=summary) for name, summary in COMMANDS.items()})

    def list_commands(self, ctx: Any) -> list[str]:
        """The order of `COMMANDS`."""
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace the summary by the command."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand; what the user can put right becomes one line on stderr."""
        with plain_errors():
            return super().invoke(ctx)


def load_command(name: str) -> Any:
    """The click command of a subcommand, with its options.

    Args:
        name: a key of `COMMANDS`.
    """
    target = getattr(import_module(f"drt.cli.{name}"), name)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, rich_markup_mode="markdown")
        target.command(name)(function)
    command = get_command(target)
    command.name = name
    return command


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"drt {drt.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # subcommands inherit it
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Language models that read millions of tokens with a constant attention window."""


def main() -> None:
    """Entry point of the `drt` script and of `python -m drt`."""
    keep_freed_memory()
    with program():
        app(prog_name="drt")
