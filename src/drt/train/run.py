"""One training run, from its configuration to the exported model."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from drt.errors import DRTError, Interrupted
from drt.models.drt.embedder import attach_embedder
from drt.terminal import PlainConsole
from drt.train.batches import BatchMaker
from drt.train.checkpoints import checkpoint_folder, find_checkpoints
from drt.train.config import LanguageModelConfig, RunConfig, SummarizationConfig, TrainConfig, config_to_dict
from drt.train.curriculum import RunningTotals
from drt.train.interrupt import BetweenSteps, Interrupt
from drt.train.language_model import LanguageModelTrainer
from drt.train.logs import METRICS_FILE, Display, MetricsFile
from drt.train.models import build_model, make_tokenizer
from drt.train.record import RECORD_FILE, training_record
from drt.train.summarization import SummarizationTrainer
from drt.train.trainer import NeedleTrainer, RunTrainer
from drt.train.validation import NeedleValidation

CONFIG_FILE = "config.yaml"
FINAL_FOLDER = "final"


def run_training(config: RunConfig, command: list[str], console: Console | None = None) -> Path:
    """Train, or go on with a run that was stopped.

    A run is its `output_dir`: when that holds checkpoints of the same configuration, training goes on from
    the newest whole one, and every loss is what it would have been without the stop (bit for bit on a CPU).
    Under `torchrun` every process calls this; the first one reports and writes.

    Args:
        config: the run.
        command: the command line, for the record beside the exported model.
        console: where to report; default: the terminal's standard error.

    Returns:
        The folder of the trained model: config, weights, tokenizer, metrics.jsonl and training.json.

    Raises:
        DRTError: the output folder cannot be written or holds another configuration's run, a haystack or corpus is
            missing or damaged, the model's fields do not fit, a checkpoint cannot be written, or the loss is no
            longer finite.
        Interrupted: Ctrl-C, after the step at hand was finished and a checkpoint written.
    """
    rank = int(os.environ.get("RANK", "0"))
    console = PlainConsole(quiet=True) if rank else console or PlainConsole(stderr=True)
    output_dir = Path(config.output_dir)
    if rank == 0:
        prepare_output(config)
    final = output_dir / FINAL_FOLDER
    if final.exists():
        console.print(f"{final} exists: this run is finished. To train anew, choose another output_dir.")
        return final
    resume = find_resume_point(output_dir, console)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DRTError("device: wanted a GPU (cuda), but PyTorch sees none; device: auto uses the CPU then")
    if config.threads:
        torch.set_num_threads(config.threads)

    logging.disable_progress_bar()  # its bars for saving and loading weights would cut into ours
    interrupt = Interrupt()
    tokenizer = make_tokenizer(config)
    model = build_model(config)
    attach_embedder(model, tokenizer)
    if rank:
        set_seed(config.seed + rank)  # the weights are the same everywhere, the noise on the scores is not
    display = Display(console, len(config.curriculum) if isinstance(config, TrainConfig) else 1)
    callbacks: list[TrainerCallback] = [display, interrupt]
    if rank == 0:
        callbacks = [MetricsFile(output_dir), *callbacks, tensorboard_callback(output_dir, resume)]
    trainer = make_trainer(config, model, tokenizer, callbacks, interrupt)
    as_begun = deepcopy(model.config)  # a curriculum may change it
    try:
        # Several processes would not stop after the same step: Ctrl-C ends them, and the last checkpoint stays.
        with interrupt if trainer.args.world_size == 1 else nullcontext():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except BetweenSteps:  # a second Ctrl-C, which may come anywhere in a step, is none and saves nothing
        trainer.save_now()
    finally:
        display.close()
    if interrupt.requested:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} with a checkpoint in {output_dir}; "
            f"run the same command again to go on"
        )
    if rank == 0:
        export(trainer, config, command, as_begun, tokenizer)
    trainer.accelerator.wait_for_everyone()
    return final


def make_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    interrupt: Interrupt,
) -> RunTrainer:
    """The trainer of the configuration's task.

    Raises:
        DRTError: the text to train on is missing or does not fit.
    """
    if isinstance(config, LanguageModelConfig):
        return LanguageModelTrainer(config, model, tokenizer, callbacks, interrupt.check)
    if isinstance(config, SummarizationConfig):
        return SummarizationTrainer(config, model, tokenizer, callbacks, interrupt.check)
    assert isinstance(config, TrainConfig)
    return NeedleTrainer(
        config,
        model,
        tokenizer,
        make_batch=BatchMaker(config, tokenizer),
        validate=NeedleValidation(config, tokenizer, interrupt.check) if config.eval_every else None,
        callbacks=callbacks,
    )


def prepare_output(config: RunConfig) -> None:
    """Create the run's folder and write its configuration there; if it holds a run, check that it is the same.

    A start that failed before the first checkpoint leaves no run, so that the corrected configuration can follow.

    Raises:
        DRTError: the folder cannot be written, or holds another configuration's run.
    """
    output_dir = Path(config.output_dir)
    values = config_to_dict(config)
    path = output_dir / CONFIG_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
        stored = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except OSError as error:
        raise DRTError(f"output_dir {output_dir}: wanted a folder that can be written: {error}") from error
    if stored is None or not holds_run(output_dir):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)
        return
    differing = [
        key for key in {**stored, **values} if key != "output_dir" and stored.get(key) != values.get(key)
    ]
    if differing:
        shown = "; ".join(f"{key}: {stored.get(key)!r} there, {values.get(key)!r} here" for key in differing)
        raise DRTError(
            f"output_dir {output_dir} holds a run of another configuration ({shown}); "
            f"choose another output_dir or delete that folder"
        )


def holds_run(output_dir: Path) -> bool:
    """Whether a folder holds a run's checkpoints, whole or not, or its trained model."""
    return any(find_checkpoints(output_dir)) or (output_dir / FINAL_FOLDER).exists()


def find_resume_point(output_dir: Path, console: Console) -> Path | None:
    """The newest whole checkpoint, None for a fresh start; says what is skipped."""
    whole, incomplete = find_checkpoints(output_dir)
    for folder in incomplete:
        console.print(f"{folder} is incomplete (a save was cut short): skipped")
    if whole:
        console.print(f"going on from {whole[-1]}")
    return whole[-1] if whole else None


def tensorboard_callback(output_dir: Path, resume: Path | None) -> TrainerCallback:
    """The Trainer's TensorBoard callback; a resumed run hides what the stopped one wrote after its
    checkpoint.

    Raises:
        DRTError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DRTError(
            f'training logs to TensorBoard: pip install "drt-lm[tensorboard]" ({error})'
        ) from error
    from transformers.integrations.integration_utils import TensorBoardCallback

    step = None if resume is None else int(resume.name.rpartition("-")[2]) + 1
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step)
    return TensorBoardCallback(writer)


def export(
    trainer: RunTrainer,
    config: RunConfig,
    command: list[str],
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the best checkpoint by validation (without it, the last) to `final`, whole or not at all."""
    output_dir = Path(config.output_dir)
    step = trainer.state.best_global_step or trainer.state.global_step
    model = type(trainer.causal_lm).from_pretrained(checkpoint_folder(output_dir, step), config=model_config)
    temporary = output_dir / f"{FINAL_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.copyfile(output_dir / METRICS_FILE, temporary / METRICS_FILE)
    record = training_record(
        config,
        command,
        model,
        steps=trainer.state.global_step,
        exported_step=step,
        seconds=trainer.find_callback(RunningTotals).elapsed(),
        device=str(trainer.args.device),
    )
    (temporary / RECORD_FILE).write_text(record, encoding="utf-8")
    os.replace(temporary, output_dir / FINAL_FOLDER)
