"""The Hugging Face Trainer, told what a needle batch is, how it is scored and how a run is kept safe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
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
from drt.train.checkpoints import checkpoint_folder, delete_others, is_complete, mark_complete
from drt.train.config import OptimizerConfig, StageConfig, TrainConfig, config_to_dict
from drt.train.curriculum import Curriculum, RunningTotals
from drt.train.loss import needle_loss

Batch = dict[str, Tensor]
MakeBatch = Callable[[int, StageConfig], Batch]
Validate = Callable[[PreTrainedModel], dict[str, float]]
CallbackT = TypeVar("CallbackT", bound=TrainerCallback)


class StepBatches(IterableDataset[Batch]):
    """One ready batch a step, made when it is asked for."""

    def __init__(self, next_batch: Callable[[], Batch]) -> None:
        self.next_batch = next_batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()


class NeedleTrainer(Trainer):
    """Trains on needle batches.

    Args:
        config: the run.
        model: a causal language model; `chunk_ends` is passed to its forward.
        tokenizer: saved beside the model.
        make_batch: (step, stage) -> a batch as `needle_batch` makes it; must depend on nothing else.
        validate: (model in eval mode) -> metrics with the key `score`; higher is better. None: no validation.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        make_batch: MakeBatch,
        validate: Validate | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.config = config
        self.make_batch = make_batch
        self.validate = validate
        curriculum = Curriculum(config_to_dict(config)["curriculum"])
        self.causal_lm = model
        super().__init__(
            model=model,
            args=training_arguments(config, validate is not None),
            processing_class=tokenizer,
            train_dataset=StepBatches(self.next_batch),
            # The Trainer wants a data set before it validates; `evaluate` below makes its own samples.
            eval_dataset=StepBatches(self.next_batch) if validate is not None else None,
            callbacks=[RunningTotals(), curriculum, FlowCallback(), *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def find_callback(self, kind: type[CallbackT]) -> CallbackT:
        """The one callback of a class; restoring a checkpoint replaces the objects, so it is looked up."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, kind))

    def next_batch(self) -> Batch:
        """The batch of the step that comes now."""
        stage = self.find_callback(Curriculum).current
        self.causal_lm.config.gumbel_noise = stage.gumbel_noise
        self._read_chunks(stage.retrieval_top_k)
        return self.make_batch(self.state.global_step, stage)

    def _read_chunks(self, top_k: int | None) -> None:
        """Let every group read so many chunks; None: as many as the configuration says."""
        for module in self.causal_lm.modules():
            if isinstance(module, Retriever):
                module.top_k = top_k or self.causal_lm.config.retrieval_top_k

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """A loader that never runs ahead of the curriculum and leaves the global random state alone."""
        return DataLoader(StepBatches(self.next_batch), batch_size=None, generator=torch.Generator())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Answer tokens + text_weight x sampled text; adds what it saw to the running totals."""
        outputs = model(input_ids=inputs["input_ids"], chunk_ends=inputs["chunk_ends"], use_cache=False)
        loss, totals = needle_loss(
            outputs.logits,
            inputs["input_ids"],
            inputs["scored"],
            inputs["answer_mask"],
            inputs["chain_mask"],
            self.config.text_weight,
        )
        self.find_callback(RunningTotals).add(totals, inputs["input_ids"].numel())
        return (loss, outputs) if return_outputs else loss

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
            stage = self.find_callback(Curriculum).stage
            means = self.find_callback(RunningTotals).take()
            if not math.isfinite(means["loss"]):
                raise DRTError(
                    f"the loss became {means['loss']} before step {self.state.global_step}; "
                    f"a smaller optimizer.lr or dtype float32 may help"
                )
            logs = {
                "stage": stage,
                **means,
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
            }
        super().log(logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation by generating answers; its `score` selects the checkpoint."""
        assert self.validate is not None
        self.causal_lm.eval()
        self._read_chunks(None)
        metrics = {f"eval_{name}": value for name, value in self.validate(self.causal_lm).items()}
        self.causal_lm.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: walking over all parameters at every step costs more than it tells."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save a checkpoint, mark it as whole, and only then delete what is neither the best nor the last."""
        output_dir = Path(self.config.output_dir)
        folder = checkpoint_folder(output_dir, self.state.global_step)
        if is_complete(folder):
            return
        super()._save_checkpoint(model, trial)
        mark_complete(folder)
        best = self.state.best_global_step
        delete_others(output_dir, {folder} if best is None else {folder, checkpoint_folder(output_dir, best)})

    def save_now(self) -> None:
        """Save a checkpoint of the last finished step."""
        self._save_checkpoint(self.causal_lm)


class FlowCallback(TrainerCallback):
    """When to log and save, beyond the fixed intervals."""

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


def training_arguments(config: TrainConfig, validate: bool) -> TrainingArguments:
    """The Trainer's own settings for a run."""
    optimizer = config.optimizer
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
        use_cpu=config.device == "cpu",
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
    )
    # Seeing several GPUs, the Trainer would split each batch over them with DataParallel: one process, one
    # GPU.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args
