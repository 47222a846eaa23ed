"""One training run, from its configuration to the exported model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
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
from drt.files import describe_kind, new_folder, write_text
from drt.models.drt.embedder import attach_embedder
from drt.train.batches import BatchMaker
from drt.train.checkpoints import checkpoint_folder, find_fault
from drt.train.config import LanguageModelConfig, RetrievalConfig, RunConfig, SummarizationConfig, TrainConfig
from drt.train.curriculum import RunningTotals
from drt.train.folder import (
    FINAL_FOLDER,
    TENSORBOARD_FOLDER,
    BestCheckpoint,
    RunFolder,
    find_resume_point,
)
from drt.train.interrupt import BetweenSteps, Interrupt
from drt.train.language_model import LanguageModelTrainer
from drt.train.logs import METRICS_FILE, Display, MetricsFile, metrics_text
from drt.train.models import build_model, make_tokenizer
from drt.train.record import RECORD_FILE, training_record
from drt.train.retrieval import RetrievalTrainer
from drt.train.summarization import SummarizationTrainer
from drt.train.trainer import NeedleTrainer, RunTrainer
from drt.train.validation import NeedleValidation


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
    console = Console(quiet=True) if rank else console or Console(stderr=True)
    if rank:
        return _run(config, command, console, [])
    with RunFolder(config) as folder:
        return _run(config, command, console, [folder])


def _run(config: RunConfig, command: list[str], console: Console, callbacks: list[TrainerCallback]) -> Path:
    """What every process of a run does; only the first one has callbacks of its own."""
    output_dir = Path(config.output_dir)
    final = output_dir / FINAL_FOLDER
    if final.exists():
        console.print(f"{final} exists: this run is finished. To train anew, choose another output_dir.")
        return final
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DRTError("device: expected a GPU (cuda), but PyTorch sees none; device: auto uses the CPU then")
    resume = find_resume_point(output_dir, console)
    if config.threads:
        torch.set_num_threads(config.threads)

    logging.disable_progress_bar()  # its bars for saving and loading weights would cut into ours
    interrupt = Interrupt()
    tokenizer = make_tokenizer(config)
    model = build_model(config)
    attach_embedder(model, tokenizer)
    if rank := int(os.environ.get("RANK", "0")):
        set_seed(config.seed + rank)  # the weights are the same everywhere, the noise on the scores is not
    display = Display(console, len(getattr(config, "curriculum", "1")))
    callbacks = [*callbacks, BestCheckpoint(console), display, interrupt]
    if rank == 0:
        callbacks = [MetricsFile(output_dir), *callbacks]
    trainer = make_trainer(config, model, tokenizer, callbacks, interrupt)
    as_begun = deepcopy(model.config)  # a curriculum may change it
    # Several processes would not stop after the same step: Ctrl-C ends them, and the last checkpoint stays.
    stoppable = interrupt if trainer.args.world_size == 1 else nullcontext()
    with tensorboard(trainer, output_dir, resume) if rank == 0 else nullcontext():
        try:
            with stoppable:
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
    if isinstance(config, RetrievalConfig):
        return RetrievalTrainer(config, model, tokenizer, callbacks, interrupt.check)
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


@contextmanager
def tensorboard(trainer: RunTrainer, output_dir: Path, resume: Path | None) -> Iterator[None]:
    """While training, log to TensorBoard; a resumed run hides what the stopped one wrote after its checkpoint.

    Raises:
        DRTError: tensorboard is not installed, or something else than its folder is there.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DRTError(
            f'training logs to TensorBoard: pip install "drt-lm[tensorboard]" ({error})'
        ) from error
    from transformers.integrations.integration_utils import TensorBoardCallback

    folder = output_dir / TENSORBOARD_FOLDER
    if describe_kind(folder) not in ("nothing", "a folder"):
        raise DRTError(f"{folder}: expected a folder or nothing there, got {describe_kind(folder)}")
    step = None if resume is None else int(resume.name.rpartition("-")[2]) + 1
    with SummaryWriter(str(folder), purge_step=step) as writer:
        trainer.add_callback(TensorBoardCallback(writer))
        yield


def export(
    trainer: RunTrainer,
    config: RunConfig,
    command: list[str],
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the best checkpoint by validation (without it, the last) to `final`, whole or not at all.

    Raises:
        DRTError: the checkpoint is damaged, or `final` cannot be written.
    """
    output_dir = Path(config.output_dir)
    step = trainer.state.best_global_step or trainer.state.global_step
    checkpoint = checkpoint_folder(output_dir, step)
    if fault := find_fault(checkpoint):
        raise DRTError(
            f"{checkpoint} {fault}, and it is what should be exported; run the same command again: the run goes on "
            "from the checkpoints that are whole"
        )
    model = trainer.exported_model(checkpoint, model_config)
    record = training_record(
        config,
        command,
        model,
        steps=trainer.state.global_step,
        exported_step=step,
        seconds=trainer.find_callback(RunningTotals).elapsed(),
        device=str(trainer.args.device),
    )
    with new_folder(output_dir / FINAL_FOLDER) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / METRICS_FILE, metrics_text(trainer.state))
        write_text(temporary / RECORD_FILE, record)
        trainer.export_extras(temporary)
