"""`drt eval`: what a model can do, as records, tables and a report."""

from __future__ import annotations

import typer

from drt.cli.answers import ruler, summarization
from drt.cli.lm_eval import lm_eval
from drt.cli.needle import needle
from drt.cli.perplexity import perplexity, runs

eval = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@eval.callback()
def root() -> None:
    """Evaluate models: perplexity of whole documents, needles, benchmarks, summaries."""


for command in (perplexity, runs, needle, ruler, lm_eval, summarization):
    eval.command()(command)
