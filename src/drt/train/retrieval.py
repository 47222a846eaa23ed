"""Teaching a language model to use its chunk memory: batches, loss, curriculum and validation."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from drt.data.corpus import open_corpus
from drt.data.questions import read_passages
from drt.data.retrieval_mix import KINDS, RetrievalBatch, RetrievalMix
from drt.data.tokenizer import fingerprint
from drt.data.tokens import TextCodec
from drt.errors import DRTError
from drt.files import write_text
from drt.layers.window_attention import WindowAttention
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.drt.upcycle import SOURCE_FILE
from drt.train.adapters import (
    TRAINED_FILE,
    add_lora,
    is_new,
    load_trained,
    merge_lora,
    read_trained,
    save_trained,
    trained_tensors,
)
from drt.train.config import RetrievalConfig
from drt.train.curriculum import Curriculum, RunningTotals
from drt.train.retrieval_config import RetrievalStageConfig
from drt.train.trainer import Batch, RunTrainer, process_settings, training_arguments

_COUNTS = ("tokens", "tokens_right", "answers", "answers_right")
TOTALS = (
    "passes",
    "loss",
    "text_loss",
    "guidance_loss",
    "recall",
    *(f"{kind}_{count}" for kind in KINDS for count in _COUNTS),
)
_HOST = ("chunk_ends", "logits_to_keep", "retrieval_targets")  # what the model needs on the host anyway


class RetrievalCurriculum(Curriculum):
    """Stages of a retrieval run."""

    stage_class = RetrievalStageConfig


class RetrievalTrainer(RunTrainer):
    """Trains a converted model on rows with questions whose answers lie beyond the window.

    Args:
        config: the run.
        model: a DRT model with learned retrieval.
        tokenizer: the model's.
        callbacks: further callbacks.
        check_interrupt: called between the passes of a validation; may raise KeyboardInterrupt.

    Raises:
        DRTError: another kind of model, a file that is missing or holds no text or question, a tokenizer without an end
            token, rows that cannot be shared evenly.
    """

    config: RetrievalConfig

    def __init__(
        self,
        config: RetrievalConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        if not isinstance(model, DRTForCausalLM) or model.config.retriever != "learned":
            raise DRTError(
                f"task retrieval: expected a DRT model with learned retrieval, got {type(model).__name__}"
            )
        if config.lora.rank:
            add_lora(model, config.lora)
        if config.start_from is not None:
            load_trained(model, read_trained(config.start_from).tensors, config.start_from)
        args = training_arguments(config, bool(config.eval_every), **process_settings(config))
        for stage in config.curriculum:
            if config.tokens_per_step % (stage.row_length * args.world_size):
                raise DRTError(
                    f"tokens_per_step: expected a multiple of {stage.row_length} tokens of a row for each of "
                    f"{args.world_size} processes, got {config.tokens_per_step}"
                )
        mix = make_mix(config, "train", tokenizer)
        self.batch_maker = BatchesAhead(mix, config, args.process_index, args.world_size)
        validate = None
        if config.eval_every:
            held_out = make_mix(config, "validation", tokenizer)
            validate = RetrievalValidation(
                held_out, config, args.process_index, args.world_size, self._losses, check_interrupt
            )
        curriculum = RetrievalCurriculum([dataclasses.asdict(stage) for stage in config.curriculum])
        super().__init__(config, model, tokenizer, TOTALS, validate, [curriculum, *callbacks], args)
        if validate is not None:
            validate.reduce = self.sum_over_processes
            validate.autocast = self._autocast

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.compute_loss_context_manager()

    def batches(self) -> Iterator[Batch]:
        """One batch a step, of the stage that the step belongs to."""
        while True:
            curriculum = self.find_callback(RetrievalCurriculum)
            stage = curriculum.current
            self._set_window(stage.sliding_window)
            yield self.batch_maker(self.state.global_step, stage)

    def _set_window(self, window: int | None) -> None:
        for module in self.causal_lm.modules():
            if isinstance(module, WindowAttention):
                module.window = window or self.causal_lm.config.sliding_window

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Bring to the device what the loss needs there; the layout is made on the host."""
        return {
            name: tensor if name in _HOST else tensor.to(self.args.device, non_blocking=True)
            for name, tensor in inputs.items()
        }

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for what is new and one for what came from the base."""
        if self.optimizer is None:
            settings = self.config.optimizer
            groups: dict[tuple[bool, bool], list[Tensor]] = {}
            for name, parameter in self.causal_lm.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((is_new(name), parameter.ndim >= 2), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": settings.lr if new else self.config.base_lr,
                        "weight_decay": settings.weight_decay if matrices else 0.0,
                    }
                    for (new, matrices), parameters in groups.items()
                ],
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                fused=True,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Answers + text_weight x text + the guidance that is left at this step."""
        loss, totals = self._losses(model, inputs)
        self.find_callback(RunningTotals).add(totals, inputs["input_ids"].numel())
        return loss

    def guidance_weight(self) -> float:
        """Weight of the guidance: falls linearly to 0 at `guidance_until` of the run."""
        progress = self.state.global_step / (self.state.max_steps or self.config.max_steps)
        return self.config.guidance * max(0.0, 1.0 - progress / self.config.guidance_until)

    def _losses(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what it adds to the totals."""
        targets = inputs["retrieval_targets"]
        outputs = model(
            input_ids=inputs["input_ids"],
            chunk_ends=inputs["chunk_ends"],
            use_cache=False,
            logits_to_keep=inputs["logits_to_keep"],
            retrieval_targets=targets,
        )
        losses, counts = answer_losses(outputs.logits, inputs["labels"], inputs["kinds"], inputs["answers"])
        weights = losses.new_tensor([self.config.text_weight] + [1.0] * (len(KINDS) - 1))
        present = (counts[:, 0] > 0) * weights
        # Each kind counts alike, however long its answers are; text has a weight of its own beside them.
        share = present[1:].sum().clamp(min=1.0)
        loss = losses[0] * present[0] + (losses[1:] * present[1:]).sum() / share
        guided = outputs.retrieval_loss
        total = loss + self.guidance_weight() * guided
        totals = torch.stack(
            [
                torch.ones_like(loss),
                total,
                losses[0],
                guided,
                outputs.retrieval_recall,
                *counts.flatten().unbind(),
            ]
        )
        return total, totals.detach().double()

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Losses, recall, accuracies of each kind, and the stage they belong to."""
        return {"stage": self.find_callback(RetrievalCurriculum).stage, **retrieval_means(sums)}

    def exported_model(self, checkpoint: Path, config: PreTrainedConfig) -> PreTrainedModel:
        """The model of a checkpoint, with low-rank changes merged into its weights."""
        if not self.config.lora.rank:
            return super().exported_model(checkpoint, config)
        model = self.causal_lm
        # Tied weights are held once, so a name is missing.
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        self.trained = trained_tensors(model)
        merge_lora(model)
        self._set_window(None)
        model.config = config
        return model

    def export_extras(self, folder: Path) -> None:
        """With low-rank changes: what was trained, without the base, and where the base came from."""
        if self.config.lora.rank:
            config = self.causal_lm.config
            assert isinstance(config, DRTConfig)  # checked
            save_trained(folder / TRAINED_FILE, self.trained, config, self.config.lora)
        assert self.config.init_from is not None  # by the configuration
        source = Path(self.config.init_from) / SOURCE_FILE
        if source.is_file():
            write_text(folder / SOURCE_FILE, source.read_text(encoding="utf-8"))


class BatchesAhead:
    """Callable (step, stage) -> this process' batch, made ahead by worker processes where the run has them.

    A batch depends on step, stage, seed and process alone, so a batch made ahead for another stage is made anew.

    Args:
        mix: makes the rows.
        config: the run.
        rank, world_size: this process, of how many.
    """

    def __init__(self, mix: RetrievalMix, config: RetrievalConfig, rank: int, world_size: int) -> None:
        self.mix, self.config = mix, config
        self.rank, self.world_size = rank, world_size
        self._workers: ProcessPoolExecutor | None = None
        self._ahead: dict[int, tuple[RetrievalStageConfig, Future[RetrievalBatch]]] = {}

    def __call__(self, step: int, stage: RetrievalStageConfig) -> Batch:
        """The batch of a step."""
        if not self.config.data.workers:
            return as_tensors(self.make(step, stage))
        if self._workers is None:
            context = multiprocessing.get_context("fork")  # the texts are shared, not copied
            self._workers = ProcessPoolExecutor(
                self.config.data.workers, context, initializer=_set_maker, initargs=(self,)
            )
        made_for, future = self._ahead.pop(step, (None, None))
        for later in range(step + 1, step + 1 + 2 * self.config.data.workers):
            if self._ahead.get(later, (None,))[0] is not stage:
                self._ahead[later] = (stage, self._workers.submit(_make, later, stage))
        return as_tensors(
            future.result() if future is not None and made_for is stage else self.make(step, stage)
        )

    def make(self, step: int, stage: RetrievalStageConfig) -> RetrievalBatch:
        """The batch of a step, here and now."""
        rows = self.config.tokens_per_step // stage.row_length // self.world_size
        return self.mix.batch(step * self.world_size + self.rank, rows, stage.rows(), self.config.seed)


_maker: BatchesAhead | None = None  # of a worker process


def _set_maker(maker: BatchesAhead) -> None:
    global _maker
    _maker = maker
    torch.set_num_threads(1)


def _make(step: int, stage: RetrievalStageConfig) -> RetrievalBatch:
    assert _maker is not None  # the initializer has run
    return _maker.make(step, stage)


class RetrievalValidation:
    """Callable (model) -> metrics of rows of the last stage, made of held-out texts and questions.

    Args:
        mix: of held-out texts.
        config: the run.
        rank, world_size: this process, of how many.
        losses: (model, batch) -> its loss and totals.
        check_interrupt: called between batches.

    Attributes:
        reduce: sums a tensor over processes; the trainer sets it.
        autocast: context of a forward pass; the trainer sets it.
    """

    reduce: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]

    def __init__(
        self,
        mix: RetrievalMix,
        config: RetrievalConfig,
        rank: int,
        world_size: int,
        losses: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
        check_interrupt: Callable[[], None],
    ) -> None:
        self.losses, self.check_interrupt = losses, check_interrupt
        maker, stage = BatchesAhead(mix, config, rank, world_size), config.curriculum[-1]
        self.made = [as_tensors(maker.make(number, stage)) for number in range(config.validation_batches)]

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics of a model in eval mode; `score` is the negative loss of answers and text."""
        device = next(model.parameters()).device
        windows = [module for module in model.modules() if isinstance(module, WindowAttention)]
        trained_with = windows[0].window
        for module in windows:
            module.window = model.config.sliding_window
        totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)
        for batch in self.made:
            self.check_interrupt()
            there = {name: tensor if name in _HOST else tensor.to(device) for name, tensor in batch.items()}
            with self.autocast():
                totals += self.losses(model, there)[1]
        for module in windows:
            module.window = trained_with
        sums = dict(zip(TOTALS, self.reduce(totals).tolist(), strict=True))
        means = retrieval_means(sums)
        return {"score": -means["loss"], **means}


def make_mix(config: RetrievalConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> RetrievalMix:
    """Open a split of the corpus and read the questions that belong to it.

    Raises:
        DRTError: a corpus or file that is missing, damaged or of another tokenizer; a tokenizer without an end token.
    """
    data = config.data
    if tokenizer.eos_token_id is None:
        raise DRTError(
            "task retrieval: expected a tokenizer with an end token, which ends an answer; it has none"
        )
    corpus = open_corpus(data.corpus, split, fingerprint=fingerprint(tokenizer), verify=data.verify)
    questions = data.questions if split == "train" else data.validation_questions
    return RetrievalMix(corpus, read_passages(questions), TextCodec(tokenizer), tokenizer.eos_token_id)


def as_tensors(made: RetrievalBatch) -> Batch:
    """A batch under the names that the model and the loss know."""
    return {
        "input_ids": torch.from_numpy(made.input_ids),
        "chunk_ends": torch.from_numpy(made.chunk_ends),
        "logits_to_keep": torch.from_numpy(made.kept),
        "labels": torch.from_numpy(made.labels),
        "kinds": torch.from_numpy(made.kinds),
        "answers": torch.from_numpy(made.answers),
        "retrieval_targets": torch.from_numpy(made.targets),
    }


def answer_losses(logits: Tensor, labels: Tensor, kinds: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of each kind of token, and what was right.

    Args:
        logits: (B, n, V).
        labels: (B, n), -100 at padding.
        kinds: (B, n), an index into `KINDS`.
        answers: (B, n), number of the answer in its row; -1 for text.

    Returns:
        (kinds,) float32 losses, 0 for a kind that does not occur; (kinds, 4) counts: tokens, right ones, answers, and
        those that are right as a whole.
    """
    scored = labels != -100
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    right = (logits.detach().argmax(-1) == labels) & scored
    is_kind = F.one_hot(kinds.long(), len(KINDS)).bool() & scored.unsqueeze(-1)
    tokens = is_kind.sum((0, 1))
    means = (losses.unsqueeze(-1) * is_kind).sum((0, 1)) / tokens.clamp(min=1)
    rows = torch.arange(len(labels), device=labels.device).unsqueeze(1)
    width = labels.shape[1] + 1  # no row has more answers than scored tokens
    answer = (rows * width + answers.long() + 1).flatten()
    size = len(labels) * width
    wrong = torch.zeros(size, device=labels.device).index_add_(0, answer, (scored & ~right).flatten().float())
    first = torch.ones_like(scored)
    first[:, 1:] = answers[:, 1:] != answers[:, :-1]
    begins = first & (answers >= 0) & scored
    whole = begins & (wrong[answer].view_as(begins) == 0)
    counts = [(is_kind & mask.unsqueeze(-1)).sum((0, 1)) for mask in (scored, right, begins, whole)]
    return means, torch.stack(counts, -1)


def retrieval_means(sums: dict[str, float]) -> dict[str, float]:
    """What is logged of the totals of several passes.

    Args:
        sums: by the names in `TOTALS`.
    """
    means = {name: sums[name] / sums["passes"] for name in ("loss", "text_loss", "guidance_loss", "recall")}
    for kind in KINDS[1:]:
        if sums[f"{kind}_tokens"]:
            means[f"{kind}_accuracy"] = sums[f"{kind}_tokens_right"] / sums[f"{kind}_tokens"]
            means[f"{kind}_exact"] = sums[f"{kind}_answers_right"] / max(sums[f"{kind}_answers"], 1.0)
    asked, whole = (
        sum(sums[f"{kind}_{count}"] for kind in KINDS[1:]) for count in ("answers", "answers_right")
    )
    means["exact_match"] = whole / max(asked, 1.0)
    means["answer_accuracy"] = means.get("fact_accuracy", 0.0)  # what the curriculum goes by
    return means
