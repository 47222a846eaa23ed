"""The Hugging Face Trainer, told how a run is kept safe, what a needle batch is and how it is scored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from drt.errors import DRTError
from drt.layers.retriever import Retriever
from drt.train.checkpoints import (
    checkpoint_folder,
    delete,
    delete_others,
    explained,
    find_checkpoints,
    mark_complete,
)
from drt.train.config import (
    OptimizerConfig,
    RetrievalConfig,
    RowsConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    config_to_dict,
)
from drt.train.curriculum import Curriculum, RunningTotals
from drt.train.logs import is_validation
from drt.train.loss import TOTALS, needle_loss, needle_means

Batch = dict[str, Tensor]
MakeBatch = Callable[[int, StageConfig], Batch]
Validate = Callable[[PreTrainedModel], dict[str, float]]
CallbackT = TypeVar("CallbackT", bound=TrainerCallback)


class Batches(IterableDataset[Batch]):
    """Ready batches from a generator, each made when it is asked for."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


class RunTrainer(Trainer):
    """What the trainers of all tasks have in common: schedule, totals, validation, and checkpoints kept safe.

    Args:
        config: the run.
        model: a causal language model.
        tokenizer: saved beside the model.
        totals: names of the sums that `compute_loss` adds to the running totals.
        validate: (model in eval mode) -> metrics with the key `score`; higher is better. None: no validation.
        callbacks: further callbacks, after those that count.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        totals: Sequence[str],
        validate: Validate | None,
        callbacks: list[TrainerCallback],
        args: TrainingArguments,
    ) -> None:
        self.config = config
        self.validate = validate
        self.causal_lm = model
        self._saved_step: int | None = None
        if config.gradient_checkpointing:
            # transformers 5.23 calls it by another name than 5.17, and warns of the old one.
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable()
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Batches(self.batches),
            # The Trainer wants a data set before it validates; `evaluate` below makes its own samples.
            eval_dataset=Batches(self.batches) if validate is not None else None,
            callbacks=[RunningTotals(totals), *callbacks, FlowCallback(self.go_on)],
        )
        self.remove_callback(PrinterCallback)

    def batches(self) -> Iterator[Batch]:
        """Batches from the step on that comes now, without end."""
        raise NotImplementedError

    def remaining_batches(self) -> Iterator[Batch]:
        """The batches; none where a run goes on from its last step, for the Trainer looks only after one more."""
        if self.state.global_step < self.state.max_steps:
            yield from self.batches()

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """What is logged of the sums since the last log; `loss` among it."""
        raise NotImplementedError

    def find_callback(self, kind: type[CallbackT]) -> CallbackT:
        """The one callback of a class; restoring a checkpoint replaces the objects, so it is looked up."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, kind))

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """A loader that never runs ahead of the run's state and leaves the global random state alone."""
        return DataLoader(Batches(self.remaining_batches), batch_size=None, generator=torch.Generator())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices only."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Linear warm-up, then a cosine whose last step is `min_lr` exactly."""
        if self.lr_scheduler is None:
            factor = lr_factor(self.config.optimizer, num_training_steps)
            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # the Trainer makes it first
            self.lr_scheduler = LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's mean loss by the running totals, which survive a restart."""
        if "loss" in logs:
            running = self.find_callback(RunningTotals)
            sums, tokens_per_second = running.take(self.sum_over_processes)
            means = self.means(sums)
            self._refuse_broken("loss", means["loss"])
            logs = {
                **means,
                **self.speed(tokens_per_second * self.args.world_size),
                "seconds": running.elapsed(),
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
            }
        super().log(logs)

    def _refuse_broken(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DRTError(
                f"the {what} became {value} before step {self.state.global_step}; checkpoints from before that stay; "
                "a smaller optimizer.lr or dtype float32 may help"
            )

    def refuse_broken_state(self) -> None:
        """Look at what a checkpoint would hold: the loss since the last log, and the weights.

        Raises:
            DRTError: one of them is not finite, in any process.
        """
        sums = self.find_callback(RunningTotals).peek()
        loss = 0.0 if sums is None or not any(sums.values()) else self.means(sums)["loss"]
        # Sharded weights are looked at where they lie.
        weights = (
            getattr(weight, "to_local", lambda weight=weight: weight)()
            for weight in self.causal_lm.parameters()
        )
        worst = torch.stack(
            [weight.detach().abs().max().double() for weight in weights if weight.numel()]
        ).max()
        found = torch.stack([torch.tensor(loss, dtype=torch.float64, device=worst.device), worst])
        loss, weight = self.sum_over_processes(found).tolist()
        self._refuse_broken("loss", loss)
        self._refuse_broken("largest weight", weight)

    def speed(self, tokens_per_second: float) -> dict[str, float]:
        """How fast the run is, all processes together."""
        return {"tokens_per_second": tokens_per_second}

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """A tensor added up over all processes."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation; its `score` selects the checkpoint."""
        assert self.validate is not None
        self.causal_lm.eval()
        metrics = {f"eval_{name}": value for name, value in self.validate(self.causal_lm).items()}
        self.causal_lm.train()
        self._refuse_broken("validation's score", metrics["eval_score"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def go_on(self) -> None:
        """Take the step that training goes on from as saved, and validate it if that was due and Ctrl-C came first."""
        step = self.state.global_step
        self._saved_step = step or None
        if self.validate is None or step == 0:
            return
        due = step % self.config.eval_every == 0 or step >= self.state.max_steps
        done = any(is_validation(logs) and logs["step"] == step for logs in self.state.log_history)
        if due and not done:
            self._determine_best_metric(metrics=self.evaluate(), trial=None)

    def exported_model(self, checkpoint: Path, config: PreTrainedConfig) -> PreTrainedModel:
        """The model of a checkpoint as it is handed out, with that configuration."""
        model: PreTrainedModel = type(self.causal_lm).from_pretrained(
            checkpoint,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        return model

    def export_extras(self, folder: Path) -> None:
        """Write what a task hands out beside the model; called after `exported_model`."""

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: walking over all parameters at every step costs more than it tells."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save a checkpoint, list its files, and only then delete what is neither the best nor the last.

        Where the last is the best, the one before it stays: there is always one to fall back on.

        Raises:
            DRTError: the loss or a weight is no longer finite, or the checkpoint cannot be written: the disk is full,
                for one. What there is of it is deleted.
        """
        if self.state.global_step == self._saved_step:
            return
        output_dir = Path(self.config.output_dir)
        folder = checkpoint_folder(output_dir, self.state.global_step)
        main = self.args.process_index == 0
        self.find_callback(RunningTotals).merge(self.sum_over_processes, main)
        self.refuse_broken_state()
        with explained(folder):
            if main:
                delete(folder)  # of an attempt that was cut short, or damaged since
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                mark_complete(folder)
        self._saved_step = self.state.global_step
        if main:
            best = checkpoint_folder(output_dir, self.state.best_global_step or self.state.global_step)
            complete = find_checkpoints(output_dir)[0]
            before = complete[: complete.index(folder)]
            delete_others(output_dir, {folder, best} if best != folder else {folder, *before[-1:]})
        self.accelerator.wait_for_everyone()

    def save_now(self) -> None:
        """Save a checkpoint of the last finished step."""
        self._save_checkpoint(self.causal_lm)


class NeedleTrainer(RunTrainer):
    """Trains on needle batches.

    Args:
        config: the run.
        model: a causal language model; `chunk_ends` is passed to its forward.
        tokenizer: saved beside the model.
        make_batch: (step, stage) -> a batch as `BatchMaker` makes it; must depend on nothing else.
        validate: (model in eval mode) -> metrics with the key `score`; higher is better. None: no validation.
        callbacks: further callbacks.

    Raises:
        DRTError: several processes, or a model with chunks of another size than the run's.
    """

    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        make_batch: MakeBatch,
        validate: Validate | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        chunk_size = getattr(model.config, "chunk_size", None)
        if chunk_size not in (None, config.tokens_per_chunk):
            raise DRTError(f"chunk_size: expected the model's {chunk_size}, got {config.tokens_per_chunk}")
        self.make_batch = make_batch
        curriculum = Curriculum(config_to_dict(config)["curriculum"])
        args = training_arguments(config, validate is not None)
        if args.world_size > 1:
            raise DRTError(f"task needles: expected one process, got {args.world_size}")
        super().__init__(config, model, tokenizer, TOTALS, validate, [curriculum, *callbacks], args)

    def batches(self) -> Iterator[Batch]:
        """One ready batch a step, made when it is asked for: the stage may have changed."""
        while True:
            stage = self.find_callback(Curriculum).current
            if hasattr(self.causal_lm.config, "gumbel_noise"):  # a baseline selects no chunks in training
                self.causal_lm.config.gumbel_noise = stage.gumbel_noise
            self._read_chunks(stage.retrieval_top_k)
            yield self.make_batch(self.state.global_step, stage)

    def _read_chunks(self, top_k: int | None) -> None:
        """Let every group read so many chunks; None: as many as the configuration says."""
        for module in self.causal_lm.modules():
            if isinstance(module, Retriever):
                module.top_k = top_k or self.causal_lm.config.retrieval_top_k

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Answer tokens + text_weight x sampled text; adds what it saw to the running totals."""
        outputs = model(
            input_ids=inputs["input_ids"],
            chunk_ends=inputs["chunk_ends"],
            use_cache=False,
            logits_to_keep=inputs["logits_to_keep"],
        )
        loss, totals = needle_loss(
            outputs.logits,
            inputs["input_ids"],
            inputs["scored"],
            inputs["predicted_by"],
            inputs["answer_mask"],
            inputs["chain_mask"],
            self.config.text_weight,
        )
        self.find_callback(RunningTotals).add(totals, inputs["input_ids"].numel())
        return (loss, outputs) if return_outputs else loss

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Losses and accuracies, and the stage they belong to."""
        return {"stage": self.find_callback(Curriculum).stage, **needle_means(sums)}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation by generating answers, with as many chunks as the configuration says."""
        self._read_chunks(None)
        return super().evaluate(*args, **kwargs)


class FlowCallback(TrainerCallback):
    """When to log, validate and save, beyond the fixed intervals.

    Args:
        before_training: called before the first step, with the state restored.
    """

    def __init__(self, before_training: Callable[[], None]) -> None:
        self.before_training = before_training

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run is one epoch."""
        self.before_training()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step is always logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was validated is saved, so that the best checkpoint exists."""
        control.should_save = True


def lr_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of a step, as a factor of `config.lr`; steps count from 0."""
    floor = config.min_lr / config.lr

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        decay_steps = max(max_steps - 1 - config.warmup_steps, 1)
        progress = min((step - config.warmup_steps) / decay_steps, 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def training_arguments(config: RunConfig, validate: bool, **settings: Any) -> TrainingArguments:
    """The Trainer's own settings for a run; `settings` are the task's own."""
    optimizer = config.optimizer
    # Said even where there is nothing else: the Trainer refuses bf16 otherwise.
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        seed=config.seed,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        optim="adamw_torch_fused",
        bf16=config.dtype == "bfloat16",
        use_cpu=on_cpu,
        torch_compile=config.compile,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide a broken loss
        eval_strategy="steps" if validate else "no",
        eval_steps=config.eval_every or None,
        metric_for_best_model="score" if validate else None,
        greater_is_better=True,
        save_strategy="steps",
        save_steps=config.save_every,
        restore_callback_states_from_checkpoint=True,
        ignore_data_skip=True,  # a batch is made from its step's number: there is nothing to skip
        dataloader_num_workers=0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cache=True,  # the Trainer writes this into the model's config, and the model is there to generate
        **settings,
    )
    # Seeing several GPUs, the Trainer would split each batch over them with DataParallel: one process, one
    # GPU.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def process_settings(config: RowsConfig | RetrievalConfig) -> dict[str, Any]:
    """The Trainer's settings for several processes.

    Raises:
        DRTError: one process has nothing to share a model with.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if config.sharding != "none":
            raise DRTError(
                f"sharding: {config.sharding} wants several processes, as torchrun starts them; got one"
            )
        return {}
    settings: dict[str, Any] = {"ddp_find_unused_parameters": False}
    if config.device == "cpu":
        settings["ddp_backend"] = "gloo"
    if config.sharding == "fsdp":
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
        }
    return settings
