"""lm-eval (EleutherAI) on this package's models: a model class that knows where a prompt ends, and its results as
records. Importing this wants lm-eval; its registry knows the class as `drt`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.eval.results import HarnessRecord
from drt.files import describe_kind
from drt.models.common.generation import OwnCacheGenerationMixin
from drt.models.loading import load_model_config

logger = logging.getLogger(__name__)

READ_TOKENS = 8192  # of each row in a pass over a context
SCORED_TOKENS = 1024  # of each row in a pass over continuations, whose logits are all made

Request = tuple[
    tuple[str, str] | None, list[int], list[int]
]  # texts, tokens of the context, of the continuation
Answer = tuple[
    float, bool
]  # log-probability of the continuation, and whether it is what greedy decoding gives


class _Context(NamedTuple):
    """A context, whether its last chunk closes, and what is to be scored after it: numbers of requests."""

    token_ids: tuple[int, ...]
    closes: bool
    requests: list[int]


class DRTLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """`HFLM` for this package's models, in which `loglikelihood` and generation are one function.

    The open chunk closes at the end of a context wherever `generate` closes it at the end of a prompt. A rolling
    log-likelihood has no prompt, so nothing closes there. A context is read once for all of its continuations, a
    segment at a time.

    Args:
        pretrained: folder of a checkpoint, or a model.
        close_prompt: close the chunk there. Default: what the model's generation configuration says.
        batch_size: contexts read together.
        add_bos_token: also add the tokenizer's special tokens; those of a byte tokenizer would end a prompt.
        settings: others of `HFLM`.

    Raises:
        DRTError: no checkpoint folder, another library's model, or a batch_size that is no number.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        close_prompt: bool | None = None,
        batch_size: int | str = 1,
        add_bos_token: bool = False,
        **settings: Any,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DRTError(f"batch_size: expected a number of contexts, at least 1, got {batch_size!r}")
        if isinstance(pretrained, str):
            load_model_config(pretrained)  # what is no folder of ours would be looked for on the network
        with _quiet():  # it warns of all that is not of its own library
            super().__init__(
                pretrained,
                batch_size=int(batch_size),
                add_bos_token=add_bos_token,
                **{"backend": "causal"} | settings,
            )
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not isinstance(model, OwnCacheGenerationMixin):
            raise DRTError(
                f"lm-eval's model drt: expected one of this package's models, got {type(model).__name__}; use hf"
            )
        self.close_prompt = model.closes_prompt(close_prompt)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if hasattr(self.model.config, "close_prompt"):
            settings.setdefault("close_prompt", self.close_prompt)
        return super()._model_generate(context, max_length, stop, **settings)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """An answer for each request; those of one context are scored together."""
        contexts = self._contexts(requests)
        answers: dict[int, Answer] = {}
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0) as bar:
            for first in range(0, len(contexts), size):
                batch = contexts[first : first + size]
                numbers = [number for context in batch for number in context.requests]
                found = self._score(batch, [requests[number][2] for number in numbers])
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
                    if (texts := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _contexts(self, requests: list[Request]) -> list[_Context]:
        """The different contexts, longest first."""
        contexts: dict[tuple[tuple[int, ...], bool], _Context] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise DRTError(
                    f"expected a context and a continuation of 1 to {self.max_length} tokens, got {len(context)} and "
                    f"{len(continuation)}; raise max_length"
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            if len(kept) < len(context):
                logger.warning(
                    "max_length %d: the first %d tokens of a context are cut off",
                    self.max_length,
                    len(context) - len(kept),
                )
            closes = self.close_prompt and texts is not None and texts[0] != ""
            key = (tuple(kept), closes)
            contexts.setdefault(key, _Context(*key, [])).requests.append(number)
        return sorted(contexts.values(), key=lambda context: -len(context.token_ids))

    @torch.no_grad()
    def _score(self, contexts: Sequence[_Context], continuations: Sequence[list[int]]) -> Iterator[Answer]:
        """Answers for the continuations of each context, in their order."""
        logits, cache = self._read(contexts)
        rows = [row for row, context in enumerate(contexts) for _ in context.requests]
        index = torch.tensor(rows, device=self.device)
        cache.select_rows(index)  # type: ignore[attr-defined]  # of our caches
        logits = logits[index]
        longest = max(map(len, continuations))
        # Padding on the right is seen by nothing that counts.
        targets = torch.tensor(
            [ids + [0] * (longest - len(ids)) for ids in continuations], device=self.device
        )
        counts = torch.arange(longest) < torch.tensor([len(ids) for ids in continuations]).unsqueeze(1)
        chosen, best = [], []
        for first in range(0, longest, SCORED_TOKENS):
            part = targets[:, first : first + SCORED_TOKENS]
            scored = part.shape[1]
            read = part[:, : longest - 1 - first]  # nothing is asked of what follows the last token
            if read.shape[1]:
                logits = torch.cat([logits, self._pass(read, cache).logits], 1)
            scores = logits[:, :scored].float().log_softmax(-1)
            logits = logits[:, scored:]
            chosen.append(scores.gather(2, part.unsqueeze(2)).squeeze(2).cpu())
            best.append((scores.argmax(-1) == part).cpu())
        sums = torch.where(counts, torch.cat(chosen, 1), 0).double().sum(1)
        greedy = (torch.cat(best, 1) | ~counts).all(1)
        return zip(sums.tolist(), greedy.tolist(), strict=True)

    def _read(self, contexts: Sequence[_Context]) -> tuple[Tensor, Cache]:
        """Read contexts; returns the logits (B, 1, V) of what follows them, and the cache."""
        longest = max(len(context.token_ids) for context in contexts)
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, longest - len(context.token_ids) :] = torch.tensor(context.token_ids)
            mask[row, longest - len(context.token_ids) :] = 1
        cache = None
        for first in range(0, longest, READ_TOKENS):
            last = min(first + READ_TOKENS, longest)
            more: dict[str, Any] = {"attention_mask": mask[:, :last].to(self.device), "logits_to_keep": 1}
            if last == longest and any(context.closes for context in contexts):
                ends = torch.zeros(len(contexts), last - first, dtype=torch.bool)
                ends[:, -1] = torch.tensor([context.closes for context in contexts])
                more["chunk_ends"] = ends.to(self.device)
            output = self._pass(ids[:, first:last].to(self.device), cache, **more)
            cache = output.past_key_values
        assert cache is not None
        return output.logits, cache

    def _pass(self, ids: Tensor, cache: Cache | None, **more: Any) -> Any:
        with torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more)


@contextmanager
def _quiet() -> Iterator[None]:
    reporter = logging.getLogger("lm_eval.models.huggingface")
    level = reporter.level
    reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reporter.setLevel(level)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    checkpoint: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
) -> list[HarnessRecord]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: one of this package's, in eval mode, on any device.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags.
        checkpoint: name of the model, for the records.
        include_path: folder of further tasks, YAML files.
        num_fewshot: examples before each question. Default: the task's own.
        limit: questions of each task, the first ones. Default: all.
        batch_size: contexts read together.
        max_length: tokens of a text; longer ones lose their beginning. Default: ``config.max_position_embeddings``.

    Returns:
        A record of each task and measure.

    Raises:
        DRTError: an unknown task, or one whose data cannot be had or that this model cannot do.
    """
    if include_path is not None and not include_path.is_dir():
        raise DRTError(f"{include_path}: expected a folder of tasks, got {describe_kind(include_path)}")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise DRTError(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists what it knows")
    harness = DRTLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    try:
        found = simple_evaluate(
            harness,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, ImportError) as error:
        raise DRTError(f"lm-eval, {', '.join(tasks)}: {error}") from error
    assert found is not None  # only other processes of a distributed run get nothing
    return list(_records(found, model, checkpoint))


def _records(found: Any, model: PreTrainedModel, checkpoint: str) -> Iterator[HarnessRecord]:
    """What lm-eval found, a record for each number: it names them `acc,none`, `acc_stderr,none` (measure, filter)."""
    for task, numbers in found["results"].items():
        for name, value in numbers.items():
            measure, comma, filtered = name.partition(",")
            if not comma or measure.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = numbers.get(f"{measure}_stderr,{filtered}")
            yield HarnessRecord(
                task=task,
                checkpoint=checkpoint,
                device=str(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                measure=measure if filtered == "none" else f"{measure} ({filtered})",
                value=float(value),
                standard_error=float(error) if isinstance(error, float) and math.isfinite(error) else None,
                shots=found["n-shot"].get(task),
                questions=found["n-samples"].get(task, {}).get("effective"),
                version=str(found["versions"].get(task, "")),
            )
