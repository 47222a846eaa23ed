"""`drt eval lm-eval`: tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drt.cli.answers import Checkpoint, Device, Dtype, Json
from drt.cli.shared import check_outputs, load_checkpoint, parse_length, write_records
from drt.errors import DRTError
from drt.terminal import say


def lm_eval(
    tasks: Annotated[list[str], typer.Argument(metavar="TASKS...", help="Names of tasks, groups or tags.")],
    checkpoint: Checkpoint,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of further tasks, YAML files as lm-eval has them."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many questions of a task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts read together.")] = 1,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens of a text; longer ones lose their beginning. Default: max_position_embeddings in config.json.",
        ),
    ] = None,
    json: Json = Path("lm-eval.jsonl"),
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Evaluate a model on tasks of lm-eval (EleutherAI), which fetches their data.

    A question's last chunk closes where its answer begins, as the checkpoint's `close_prompt` says, for scored answers
    as for generated ones; `lm_eval --model hf` closes it for generated ones only.

    Examples:

        drt eval lm-eval lambada_openai hellaswag --checkpoint runs/my-model/final

        drt eval lm-eval my_task --include-path tasks --limit 100 --checkpoint runs/my-model/final
    """
    from drt.cli.tables import print_report_table
    from drt.report.models import group_seeds
    from drt.report.tables import harness_table

    try:
        from drt.eval.lm_eval import evaluate_tasks
    except ImportError as error:
        raise DRTError(f'lm-eval is not installed: pip install "drt-lm[lm-eval]" ({error})') from error

    check_outputs({"--json": json})
    longest = None if max_length is None else parse_length("--max-length", max_length)
    loaded = load_checkpoint(checkpoint, device, dtype)
    found = evaluate_tasks(
        loaded.model,
        loaded.tokenizer,
        tasks=tasks,
        checkpoint=loaded.name,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        max_length=longest,
    )
    print_report_table(harness_table(group_seeds(write_records(json, found))))
    say(f"records: {json}")
