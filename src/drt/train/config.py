"""The YAML file of a training run: its sections as dataclasses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from drt.data.needle_mix import NeedleMixConfig
from drt.errors import DRTError
from drt.machine import MOST_THREADS
from drt.models.common.configuration import MOST_RETRIEVED
from drt.train.retrieval_config import LoraConfig, RetrievalDataConfig, RetrievalStageConfig
from drt.train.strict_yaml import describe, parse, read_mapping


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_FROM_STAGE = {
    "rows": "tokens_per_step and the stage's chunks",
    "row_length": "the stage's chunks",
    "chunk_size": "chunk_size or model.chunk_size",
    "chain_share": "the stage's chain_share",
}


def _check_mix(mix: dict[str, Any]) -> None:
    for name, source in _FROM_STAGE.items():
        _require(name not in mix, f"mix.{name}: not to be given here, it follows from {source}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how needles are mixed into it.

    Args:
        haystack: text files or folders (relative to the working directory) that training rows are cut from.
        validation_haystack: the same for validation; no text of `haystack` may be in it.
        weights: how often a row comes from each entry of `haystack`, in proportion; null: by their tokens.
        mix: fields of `NeedleMixConfig` but those that follow from the stage.
    """

    haystack: list[str]
    validation_haystack: list[str]
    weights: list[float] | None = None
    mix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.haystack), "haystack: expected at least one file, got none")
        _require(bool(self.validation_haystack), "validation_haystack: expected at least one file, got none")
        shares = self.weights
        _require(
            shares is None
            or (len(shares) == len(self.haystack) and min(shares) >= 0 and 0 < sum(shares) < math.inf),
            f"weights: expected a number for each of the {len(self.haystack)} entries of haystack, none negative "
            f"and not all 0, got {shares}",
        )
        _check_mix(self.mix)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum: rows of one length.

    Args:
        chunks: full chunks of tokens in a row; rows in a batch = tokens_per_step // (chunks x chunk_size).
        chain_share: share of the hidden things that are chains, not facts.
        gumbel_noise: add Gumbel noise to the selection of chunks.
        retrieval_top_k: chunks that are read in this stage; null: as many as the model's. As many as a row has lets
            the model learn to read before it has to choose, and every score gets a gradient.
        threshold: the next stage starts when this share of the answer tokens was right over a logging
            interval.
        max_steps: the next stage starts after so many steps at the latest; null: only by the threshold.
        mix: entries of the data section's `mix` that are different in this stage.
    """

    chunks: int
    chain_share: float = 0.0
    gumbel_noise: bool = False
    retrieval_top_k: int | None = None
    threshold: float = 0.9
    max_steps: int | None = None
    mix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.chunks >= 2, f"chunks: expected at least 2, got {self.chunks}")
        _require(0 <= self.chain_share <= 1, f"chain_share: expected 0..1, got {self.chain_share}")
        _require(
            self.retrieval_top_k is None or 1 <= self.retrieval_top_k <= MOST_RETRIEVED,
            f"retrieval_top_k: expected 1..{MOST_RETRIEVED}, got {self.retrieval_top_k}",
        )
        _require(0 < self.threshold <= 1, f"threshold: expected 0 < threshold <= 1, got {self.threshold}")
        _require(
            self.max_steps is None or self.max_steps >= 1, f"max_steps: expected >= 1, got {self.max_steps}"
        )
        _check_mix(self.mix)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a cosine from `lr` down to `min_lr` at the last step.

    Args:
        lr: peak learning rate.
        min_lr: learning rate of the last step.
        warmup_steps: steps of the linear rise to `lr`.
        beta1, beta2: AdamW's betas.
        weight_decay: on matrices only; never on norms, biases and other vectors.
        clip: largest norm of the gradient.
    """

    lr: float = 2e-3
    min_lr: float = 2e-4
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(
            0 <= self.min_lr <= self.lr, f"min_lr: expected 0 <= min_lr <= lr = {self.lr}, got {self.min_lr}"
        )
        _require(self.lr > 0, f"lr: expected a positive number, got {self.lr}")
        _require(self.warmup_steps >= 0, f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        _require(0 <= self.beta1 < 1, f"beta1: expected 0 <= beta1 < 1, got {self.beta1}")
        _require(0 <= self.beta2 < 1, f"beta2: expected 0 <= beta2 < 1, got {self.beta2}")
        _require(self.weight_decay >= 0, f"weight_decay: expected at least 0, got {self.weight_decay}")
        _require(self.clip > 0, f"clip: expected a positive number, got {self.clip}")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Needle samples in the validation haystack, answered by greedy generation.

    Args:
        lengths: tokens of a sample; `samples` samples of each task at each length.
        tasks: of `single`, `multikey`, `multihop`.
        samples: samples of one task at one length, at evenly spread depths.
        segment_size: tokens read in one forward pass.
    """

    lengths: list[int] = field(default_factory=lambda: [16384])
    tasks: list[str] = field(default_factory=lambda: ["single"])
    samples: int = 4
    segment_size: int = 4096

    def __post_init__(self) -> None:
        _require(
            bool(self.lengths) and min(self.lengths) >= 64, f"lengths: expected >= 64, got {self.lengths}"
        )
        known = {"single", "multikey", "multihop"}
        _require(
            bool(self.tasks) and known.issuperset(self.tasks), f"tasks: expected of {known}, got {self.tasks}"
        )
        _require(self.samples >= 1, f"samples: expected at least 1, got {self.samples}")
        _require(self.segment_size >= 1, f"segment_size: expected at least 1, got {self.segment_size}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever it learns.

    Args:
        output_dir: folder of the run: checkpoints, logs and, at the end, `final`.
        model: `model_type` (default `drt`) and fields of that model's configuration. With init_from: what is not
            named is as in the checkpoint, and what is named must be, but for `gumbel_noise` and `close_prompt`, whose
            default is `closes_prompts`.
        init_from: folder of the checkpoint whose weights the run starts from, such as another run's `final`; null:
            fresh weights.
        optimizer: optimizer and learning-rate schedule.
        tokens_per_step: tokens in a batch, over all processes.
        max_steps: optimizer steps.
        seed: of the initial weights, of every batch and of what is validated.
        log_every, eval_every, save_every: intervals in steps; eval_every 0 turns validation off.
        threads: CPU threads of PyTorch; 0 leaves PyTorch's own choice.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        dtype: `float32`, or `bfloat16` for automatic mixed precision.
        compile: train through `torch.compile`.
        gradient_checkpointing: keep only the layers' inputs and compute the rest again in the backward pass.
    """

    closes_prompts: ClassVar[bool] = (
        True  # the rows hold prompts, whose last chunks close where an answer begins
    )

    output_dir: str
    model: dict[str, Any]
    init_from: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokens_per_step: int = 4096
    max_steps: int = 2500
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    save_every: int = 250
    threads: int = 0
    device: str = "auto"
    dtype: str = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "max_steps", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, most in (("seed", 2**32 - 1), ("eval_every", 2**63), ("threads", MOST_THREADS)):
            _require(
                0 <= getattr(self, name) <= most, f"{name}: expected 0 to {most}, got {getattr(self, name)}"
            )
        _require(
            self.device in ("auto", "cpu", "cuda"), f"device: expected auto, cpu or cuda, got {self.device!r}"
        )
        known = ("float32", "bfloat16")
        _require(self.dtype in known, f"dtype: expected float32 or bfloat16, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A run that learns to answer questions about needles.

    Args:
        task: `needles`.
        chunk_size: tokens of a chunk, in which rows are counted; null: model.chunk_size. A model without chunks, or
            one whose fields are in its checkpoint, wants it here.
        data: text and needles.
        curriculum: stages, in order.
        validation: what is generated every `eval_every` steps.
        text_weight: weight of ordinary text in the loss, beside weight 1 for answer tokens.
        Others as in `RunConfig`.
    """

    task: str = "needles"
    chunk_size: int | None = None
    data: DataConfig
    curriculum: list[StageConfig]
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    text_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        of_model = self.model.get("chunk_size")
        size = of_model if self.chunk_size is None else self.chunk_size
        _require(
            type(size) is int and size >= 1,
            f"chunk_size, model.chunk_size: expected a whole number >= 1, got {size}",
        )
        _require(of_model in (None, size), f"chunk_size: expected model.chunk_size = {of_model}, got {size}")
        _require(bool(self.curriculum), "curriculum: expected at least one stage, got none")
        _require(self.text_weight >= 0, f"text_weight: expected at least 0, got {self.text_weight}")
        for number, stage in enumerate(self.curriculum):
            length = self.row_length(stage)
            _require(
                length >= 64,
                f"curriculum.{number}.chunks: expected a row of 64 tokens or more, got {stage.chunks} chunks of {size}",
            )
            _require(
                self.tokens_per_step >= length,
                f"tokens_per_step: expected at least {length}, one row of curriculum.{number} "
                f"({stage.chunks} chunks of {size} tokens), got {self.tokens_per_step}",
            )

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens of a chunk, in which rows are counted."""
        size: int = self.model["chunk_size"] if self.chunk_size is None else self.chunk_size
        return size

    def row_length(self, stage: StageConfig) -> int:
        """Tokens of a row of a stage."""
        return stage.chunks * self.tokens_per_chunk


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The corpus of a language model.

    Args:
        corpus: folder, as `drt data prepare` makes it; its tokenizer is the model's.
        sequence_length: tokens of a row.
        inside_documents: no row holds tokens of two documents, and documents shorter than a row are not used. False:
            a row may hold the end of one document and the beginning of the next.
        validation_sequences: rows of the validation split, evenly spread, whose loss is measured.
        verify: compare every file of the corpus with its checksum before training.
    """

    corpus: str
    sequence_length: int
    inside_documents: bool = False
    validation_sequences: int = 32
    verify: bool = True

    def __post_init__(self) -> None:
        _require(
            self.sequence_length >= 2, f"sequence_length: expected at least 2, got {self.sequence_length}"
        )
        _require(
            self.validation_sequences >= 1,
            f"validation_sequences: expected at least 1, got {self.validation_sequences}",
        )


@dataclass(frozen=True, kw_only=True)
class RowsConfig(RunConfig):
    """A run whose steps are made of rows of text, which several processes can share.

    Args:
        rows_per_pass: rows that one process computes at once; a step is made of as many passes as it takes (gradient
            accumulation). Null: all of them in one pass.
        sharding: `none`: every process holds the whole model (DDP); `fsdp`: weights, gradients and optimizer are
            split over the processes (FSDP2).
        Others as in `RunConfig`; tokens_per_step is a multiple of data.sequence_length.
    """

    rows_per_pass: int | None = None
    sharding: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.sequence_length
        _require(
            self.tokens_per_step % length == 0,
            f"tokens_per_step: expected a multiple of data.sequence_length = {length}, got {self.tokens_per_step}",
        )
        _require(self.sharding in ("none", "fsdp"), f"sharding: expected none or fsdp, got {self.sharding!r}")
        _require(
            self.rows_per_pass is None or self.rows_per_pass >= 1,
            f"rows_per_pass: expected at least 1, got {self.rows_per_pass}",
        )

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest row."""
        raise NotImplementedError

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, over all processes."""
        return self.tokens_per_step // self.sequence_length

    def passes_per_step(self, world_size: int) -> int:
        """Forward and backward passes that each process makes in a step.

        Raises:
            DRTError: the rows of a step cannot be shared evenly.
        """
        share, rest = divmod(self.rows_per_step, world_size)
        if rest:
            raise DRTError(
                f"tokens_per_step: expected as many rows for each of {world_size} processes, got "
                f"{self.rows_per_step} rows of {self.sequence_length} tokens"
            )
        passes, rest = divmod(share, self.rows_per_pass or share)
        if rest:
            raise DRTError(
                f"rows_per_pass: expected a divisor of the {share} rows of a process per step, got {self.rows_per_pass}"
            )
        return passes


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(RowsConfig):
    """A run that learns to predict the next token of a corpus.

    Args:
        task: `language_model`.
        data: the corpus and its rows.
        Others as in `RowsConfig`.
    """

    closes_prompts: ClassVar[bool] = False

    task: str
    data: CorpusConfig

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.data.sequence_length


@dataclass(frozen=True, kw_only=True)
class SummariesConfig:
    """Documents with their summaries.

    Args:
        train: file of JSON lines, plain, .xz or .gz, a document and its summary a line.
        validation: the same; no document of `train` may be in it.
        sequence_length: tokens of a row at most: the ends of longer documents are cut off, summaries are kept whole.
        document_field, summary_field: names of the fields; `article` and `highlights` in CNN-DailyMail.
        validation_pairs: pairs of `validation`, the first ones, whose loss is measured.
    """

    train: str
    validation: str
    sequence_length: int
    document_field: str = "document"
    summary_field: str = "summary"
    validation_pairs: int = 64

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 16), ("validation_pairs", 1)):
            _require(
                getattr(self, name) >= least, f"{name}: expected at least {least}, got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class SummarizationConfig(RowsConfig):
    """A run that fine-tunes a language model to summarise documents.

    Args:
        task: `summarization`.
        data: documents and summaries.
        Others as in `RowsConfig`; init_from is required, the tokenizer is the checkpoint's.
    """

    task: str
    data: SummariesConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.init_from is not None, "init_from: expected the checkpoint to fine-tune, got nothing")

    @property
    def sequence_length(self) -> int:
        """Tokens of a row at most."""
        return self.data.sequence_length


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(RunConfig):
    """A run that teaches a language model to use its chunk memory.

    Args:
        task: `retrieval`.
        data: texts and questions.
        curriculum: stages, in order.
        lora: low-rank changes of what came from the base, which then stays as it is.
        start_from: .safetensors file of the parameters that an earlier run of this kind trained; null: as in init_from.
        base_lr: peak learning rate of what came from the base, or of its low-rank changes; `optimizer.lr` is that of
            the new parts.
        guidance: weight of the cross-entropy between retrieval scores and the chunk that is known to hold the answer;
            0: next-token loss alone.
        guidance_until: share of the run after which that weight has fallen to 0.
        text_weight: weight of ordinary text in the loss, beside weight 1 for answers.
        validation_batches: batches of held-out rows.
        Others as in `RunConfig`; init_from is required, tokens_per_step is shared by all processes.
    """

    task: str
    data: RetrievalDataConfig
    curriculum: list[RetrievalStageConfig]
    lora: LoraConfig = field(default_factory=LoraConfig)
    start_from: str | None = None
    base_lr: float = 3e-4
    guidance: float = 0.0
    guidance_until: float = 1.0
    text_weight: float = 0.1
    validation_batches: int = 4
    sharding: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.init_from is not None, "init_from: expected a converted model (drt upcycle), got nothing"
        )
        _require(bool(self.curriculum), "curriculum: expected at least one stage, got none")
        _require(self.base_lr > 0, f"base_lr: expected a positive number, got {self.base_lr}")
        _require(0 < self.guidance_until <= 1, f"guidance_until: expected 0 to 1, got {self.guidance_until}")
        for name in ("guidance", "text_weight"):
            _require(getattr(self, name) >= 0, f"{name}: expected at least 0, got {getattr(self, name)}")
        _require(
            self.validation_batches >= 1,
            f"validation_batches: expected at least 1, got {self.validation_batches}",
        )
        _require(self.sharding == "none", f"sharding: expected none, got {self.sharding!r}")


TASKS: dict[str, type[RunConfig]] = {
    "needles": TrainConfig,
    "language_model": LanguageModelConfig,
    "summarization": SummarizationConfig,
    "retrieval": RetrievalConfig,
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a training configuration: of the kind that its `task` says, by default `needles`.

    Args:
        path: YAML file.
        overrides: `key=value` strings; the key is a dotted path (`optimizer.lr`, `curriculum.0.chunks`), the
            value is YAML.

    Raises:
        DRTError: the file cannot be read or is not YAML, a key is unknown or missing, a value has the wrong
            type or does not fit.
    """
    values = read_mapping(path, overrides)
    source = f"{path} with --set" if overrides else str(path)
    task = values.get("task", "needles")
    if task not in TASKS:
        raise DRTError(f"{source}: task: expected {', '.join(TASKS)}, got {describe(task)}")
    config = parse(TASKS[task], values, "", source)
    if isinstance(config, TrainConfig):
        for number, stage in enumerate(config.curriculum):
            common = {name: f"data.mix.{name}" for name in config.data.mix if name not in stage.mix}
            mix = _mix_fields(config, stage)
            parse(NeedleMixConfig, mix, f"curriculum.{number}.mix", source, elsewhere=common)
    return config


def mix_config(config: TrainConfig, stage: StageConfig) -> NeedleMixConfig:
    """What the batches of a stage are made of."""
    return NeedleMixConfig(**_mix_fields(config, stage))


def _mix_fields(config: TrainConfig, stage: StageConfig) -> dict[str, Any]:
    row_length = config.row_length(stage)
    return {
        **config.data.mix,
        **stage.mix,
        "rows": config.tokens_per_step // row_length,
        "row_length": row_length,
        "chunk_size": config.tokens_per_chunk,
        "chain_share": stage.chain_share,
    }


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration with every default filled in, as plain values that YAML and JSON can hold."""
    return dataclasses.asdict(config)
