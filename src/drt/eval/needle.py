"""Needles in a haystack: does a model find what was hidden in a long text, and how fast does it read?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from drt.data.needles import TASKS, Haystack, NeedleSample, is_correct, make_sample
from drt.errors import DRTError
from drt.eval.results import NeedleRecord
from drt.machine import clock, peak_rss_bytes
from drt.memory import DeviceStore
from drt.memory.chunk_codec import DTYPES
from drt.models.common.devices import input_device
from drt.models.drt import DRTCache, DRTForCausalLM
from drt.models.reading import read_text

SampleKey = tuple[str, int, int]  # task, length, index


@dataclass(frozen=True, kw_only=True)
class NeedlePlan:
    """What is asked.

    Sample i of the n of a task and length has its needle at depth (i + 0.5) / n, so depths are spread evenly over
    0..1; everything else about it follows from the seed and its key, whatever else is asked and in which order.

    Args:
        tasks: of `single`, `multikey`, `multihop`.
        lengths: tokens of a prompt, question included.
        samples: samples of each task at each length.
        seed: of all samples.
        needles: needles in a `multikey` text, of which one is asked.
        hops: needles in each chain of `multihop`.
        chains: chains in a `multihop` text, of which one is asked.

    Raises:
        DRTError: an unknown task; no task, no length or no sample.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    needles: int = 6
    hops: int = 2
    chains: int = 2

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise DRTError(f"expected tasks of {', '.join(TASKS)}, got {', '.join(unknown)}")
        if not self.tasks or not self.lengths or self.samples < 1:
            raise DRTError(
                f"expected at least one task, length and sample, got {self.tasks}, {self.lengths}, {self.samples}"
            )

    def depth(self, index: int) -> float:
        """Depth of a sample's needle."""
        return (index + 0.5) / self.samples

    def settings(self, task: str) -> dict[str, int]:
        """What else defines a task: the settings that it uses."""
        options: dict[str, dict[str, int]] = {
            "single": {},
            "multikey": {"needles": self.needles},
            "multihop": {"hops": self.hops, "chains": self.chains},
        }
        return options[task]

    def make_sample(
        self, key: SampleKey, tokenizer: PreTrainedTokenizerBase, haystack: Haystack
    ) -> NeedleSample:
        """The sample of that key."""
        task, length, index = key
        return make_sample(
            task,
            tokenizer,
            haystack,
            length,
            self.depth(index),
            self.seed,
            index,
            needles=self.needles,
            hops=self.hops,
            chains=self.chains,
        )

    def sample_keys(self) -> list[SampleKey]:
        """Every sample, in the order of evaluation: short lengths first, so that peak memory tells of each."""
        return [
            (task, length, index)
            for length in sorted(set(self.lengths))
            for task in dict.fromkeys(self.tasks)
            for index in range(self.samples)
        ]


def evaluate_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    plan: NeedlePlan,
    *,
    checkpoint: str,
    segment_size: int = 4096,
    batch_size: int | None = None,
    memory_dtype: str | None = None,
    done: Collection[SampleKey] = (),
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[NeedleRecord]:
    """Hide needles in real text, let the model read it and answer, and yield a record a sample.

    An answer counts when every token of it is right, generated greedily and without help. Works with any causal
    language model of the Hugging Face kind that generates from a cache.

    Args:
        model: in eval mode, on any device.
        tokenizer: the model's.
        haystack: text that the model has never seen.
        plan: what is asked.
        checkpoint: name of the model, for the records.
        segment_size: tokens of one forward pass, all rows of a batch together; bounds the memory of a pass.
        batch_size: samples of one task and length that are read together; the answers do not depend on it.
            None: as many as fit one segment whole, so one for all that is longer.
        memory_dtype: how a DRT model's cache holds keys and values of chunks, see `DeviceStore`; None: as they come.
        done: samples to leave out: those that an earlier run has answered.
        on_progress: called with the number of tokens just read.

    Raises:
        DRTError: the haystack is shorter than a length, or a length has no room for the needles; a memory_dtype for a
            model that has no chunk memory, or an unknown one.
        ValueError: segment_size or batch_size < 1, or a model in training mode.
    """
    if segment_size < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"segment_size and batch_size must be >= 1, got {segment_size} and {batch_size}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    make_cache = _cache_maker(model, memory_dtype)
    waiting = [key for key in plan.sample_keys() if key not in done]
    for key in {key[:2]: key for key in waiting}.values():
        plan.make_sample(
            key, tokenizer, haystack
        )  # what cannot be asked is known now, not after hours of reading
    records = _evaluate(
        model,
        tokenizer,
        haystack,
        plan,
        checkpoint,
        segment_size,
        batch_size,
        make_cache,
        waiting,
        on_progress,
    )
    return (replace(record, memory_dtype=memory_dtype) for record in records)


def _cache_maker(model: PreTrainedModel, memory_dtype: str | None) -> Callable[[], Cache | None]:
    """Makes the state that a text is read into; ``None``: the model makes its own."""
    if memory_dtype is None:
        return lambda: None
    if not isinstance(model, DRTForCausalLM) or not model.config.retrieval:
        raise DRTError(
            f"a memory in {memory_dtype} is a DRT model's; {type(model).__name__} has no chunk memory"
        )
    if memory_dtype not in DTYPES:
        raise DRTError(f"memory_dtype: expected one of {', '.join(DTYPES)}, got {memory_dtype!r}")
    config = model.config
    return lambda: DRTCache(config, DeviceStore(dtype=memory_dtype))


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    plan: NeedlePlan,
    checkpoint: str,
    segment_size: int,
    batch_size: int | None,
    make_cache: Callable[[], Cache | None],
    waiting: list[SampleKey],
    on_progress: Callable[[int], None] | None,
) -> Iterator[NeedleRecord]:
    while waiting:
        task, length, _ = waiting[0]
        rows = batch_size or max(1, segment_size // length)
        keys = [key for key in waiting[:rows] if key[:2] == (task, length)]
        waiting = waiting[len(keys) :]
        samples = [plan.make_sample(key, tokenizer, haystack) for key in keys]
        answers = _read_and_answer(
            model, samples, max(1, segment_size // len(keys)), make_cache(), on_progress
        )
        for key, sample, generated in zip(keys, samples, answers.generated, strict=True):
            yield NeedleRecord(
                task=task,
                length=length,
                depth=plan.depth(key[2]),
                index=key[2],
                seed=plan.seed,
                expected=sample.expected,
                generated=cast(str, tokenizer.decode(generated)),
                correct=is_correct(sample, generated),
                tokens_per_second=length * len(keys) / answers.prefill_seconds,
                prefill_seconds=answers.prefill_seconds / len(keys),
                decode_seconds_per_token=answers.decode_seconds_per_token,
                peak_rss_bytes=peak_rss_bytes(),
                peak_device_bytes=answers.peak_device_bytes,
                batch_size=len(keys),
                checkpoint=checkpoint,
                device=str(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                haystack=list(haystack.names),
                settings=plan.settings(task),
            )


def finished_keys(
    records: list[NeedleRecord],
    plan: NeedlePlan,
    *,
    checkpoint: str,
    dtype: str,
    haystack: list[str],
    memory_dtype: str | None = None,
) -> set[SampleKey]:
    """The samples that an earlier run of the same evaluation has answered.

    Args:
        records: of the earlier run.
        plan: of this run; its tasks and lengths may be others, all else has to be the same.
        checkpoint, dtype, haystack, memory_dtype: as this run's records will hold them.

    Raises:
        DRTError: a record of an evaluation with other settings; says which.
    """
    for record in records:
        wanted = {
            "seed": plan.seed,
            "depth": plan.depth(record.index),
            "checkpoint": checkpoint,
            "dtype": dtype,
            "haystack": haystack,
            "memory_dtype": memory_dtype,
            "settings": plan.settings(record.task) if record.task in TASKS else None,
        }
        for name, value in wanted.items():
            if getattr(record, name) != value:
                raise DRTError(
                    f"the records are of another evaluation: {name} is {getattr(record, name)!r} there "
                    f"({record.task}, {record.length} tokens, sample {record.index}) and {value!r} here"
                )
    return {(record.task, record.length, record.index) for record in records}


class _Answers(NamedTuple):
    """What a batch gave: the generated tokens of each row, cut to its answer's length, and the cost."""

    generated: list[list[int]]
    prefill_seconds: float
    decode_seconds_per_token: float
    peak_device_bytes: int | None


@torch.no_grad()
def _read_and_answer(
    model: PreTrainedModel,
    samples: list[NeedleSample],
    segment_size: int,
    cache: Cache | None,
    on_progress: Callable[[int], None] | None,
) -> _Answers:
    """Read prompts of equal length, `segment_size` tokens of each at a time, and continue them greedily."""
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompts = torch.stack(
        [torch.as_tensor(sample.input_ids, dtype=torch.int32, device="cpu") for sample in samples]
    )
    start = clock(device)
    cache = read_text(model, prompts[:, :-1], segment_size, cache, on_progress)
    read = clock(device)
    ids = prompts.to(device).long()
    sequences = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max(len(sample.answer_ids) for sample in samples),
        do_sample=False,
        num_beams=1,
    )
    finished = clock(device)
    if on_progress is not None:
        on_progress(len(samples))
    generated = sequences[:, ids.shape[1] :].tolist()
    return _Answers(
        generated=[row[: len(sample.answer_ids)] for row, sample in zip(generated, samples, strict=True)],
        prefill_seconds=read - start,
        decode_seconds_per_token=(finished - read) / len(generated[0]),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
