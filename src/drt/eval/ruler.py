"""RULER (arXiv 2404.06654) through lm-eval: its texts, its scores and its way of generating, for the tasks that need
no download."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.eval.results import AnswerRecord

DATA = "RULER"
MEASURE = "recall"  # share of the expected strings that the generated text holds
TASKS = ("niah_multikey_2", "niah_multikey_3", "ruler_vt")
ANSWER_TOKENS = {"niah_multikey_2": 128, "niah_multikey_3": 128, "ruler_vt": 30}  # as the benchmark has them


def evaluate_ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    checkpoint: str,
    batch_size: int = 1,
) -> Iterator[AnswerRecord]:
    """Ask RULER's questions and yield a record of each.

    `niah_multikey_2` and `niah_multikey_3` hide a needle among others that differ in their key (words and numbers, or
    UUIDs); `ruler_vt` follows a chain of variables. A text is read in one pass.

    Args:
        model: a causal language model in eval mode, on any device.
        tokenizer: the model's; lengths are counted in its tokens.
        tasks: of `TASKS`.
        lengths: tokens of a text, the room for the answer included.
        samples: texts of each task and length.
        seed: of the texts.
        checkpoint: name of the model, for the records.
        batch_size: texts read together.

    Raises:
        DRTError: an unknown task, a length that a task does not fit into, or lm-eval is not installed.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise DRTError(f"wanted tasks of {', '.join(TASKS)}, got {', '.join(unknown)}")
    instance, harness_class, score = _harness()
    for length in lengths:
        for task in tasks:
            documents = make_documents(task, tokenizer, length, samples, seed)
            room = ANSWER_TOKENS[task]
            prompts = [f"{document['input']} {document['gen_prefix']}" for document in documents]
            longest = max(len(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts)
            harness = harness_class(
                pretrained=model,
                tokenizer=tokenizer,
                max_length=longest + room + 1,  # the harness would cut the beginning off a longer prompt
                batch_size=batch_size,
                add_bos_token=False,
            )
            settings = {"until": [], "max_gen_toks": room, "do_sample": False}
            requests = [instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)]
            answers = harness.generate_until(requests, disable_tqdm=True)
            for index, (document, answer) in enumerate(zip(documents, answers, strict=True)):
                yield AnswerRecord(
                    task=task,
                    checkpoint=checkpoint,
                    device=str(model.device),
                    dtype=str(model.dtype).removeprefix("torch."),
                    data=DATA,
                    index=index,
                    length=length,
                    expected=list(document["outputs"]),
                    generated=answer,
                    scores={MEASURE: score(document, [answer])[str(length)]},
                )


def make_documents(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int
) -> list[dict[str, Any]]:
    """lm-eval's texts of a task: `input`, `gen_prefix` (how the answer begins) and `outputs` (what it must hold).

    Args:
        task: of `TASKS`.
        tokenizer: counts the length.
        length: tokens of a text, the room for the answer included.
        samples: how many.
        seed: of them; lm-eval draws from the global generators, whose state is put back.

    Raises:
        DRTError: nothing fits into that length.
    """
    module = _import(task)  # before the seed: what is imported draws random numbers too
    make = _variable_tracking if task == "ruler_vt" else _multikey
    try:
        with redirect_stdout(io.StringIO()), _seeded(seed):  # lm-eval prints how it searches for the length
            return make(module, task, tokenizer, length, samples)
    except ValueError as error:
        raise DRTError(f"{task} at {length} tokens: {error}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that lm-eval draws from, and put their state back."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _variable_tracking(
    vt_utils: Any, task: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int
) -> list[dict[str, Any]]:
    make = vt_utils.sys_vartrack_w_noise_random
    # lm-eval gives the example 500 tokens, which is too few where tokens are bytes, and then never ends.
    text, names = vt_utils.generate_input_output(5, 1, 4, is_icl=True)
    room = len(tokenizer(f"{text} {names}").input_ids) + ANSWER_TOKENS[task]
    example = make(
        tokenizer=tokenizer, num_samples=1, max_seq_length=max(500, int(1.1 * room)), incremental=5
    )[0]
    shown = example["input"] + " " + " ".join(example["outputs"])
    smallest, _ = vt_utils.generate_input_output(10, 1, 4)
    wanted = sum(len(tokenizer(text).input_ids) for text in (shown, smallest))
    wanted = int(1.05 * wanted) + ANSWER_TOKENS[task]  # names and numbers vary a little in tokens
    if length < wanted:  # lm-eval would look for a text that fits for ever
        raise ValueError(f"wanted at least {wanted} tokens, for its example and the shortest text")
    return make(tokenizer=tokenizer, num_samples=samples, max_seq_length=length, icl_example=example)


def _multikey(
    niah_utils: Any, task: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int
) -> list[dict[str, Any]]:
    kind = {"niah_multikey_2": ("words", "numbers"), "niah_multikey_3": ("uuids", "uuids")}[task]
    return niah_utils.generate_samples(
        niah_utils.get_haystack(type_haystack="needle"),
        TOKENIZER=tokenizer,
        max_seq_length=length,
        template=niah_utils.TEMPLATE,
        type_haystack="needle",
        type_needle_k=kind[0],
        type_needle_v=kind[1],
        num_samples=samples,
    )


def _import(task: str) -> Any:
    """The module of lm-eval that makes a task's texts.

    The needles' module fetches a sentence splitter as it is imported, which only the tasks with essays use, and waits
    minutes for it where there is no network: it is told that there is none.
    """
    if task == "ruler_vt":
        from lm_eval.tasks.ruler import vt_utils

        return vt_utils
    import nltk

    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        from lm_eval.tasks.ruler import niah_utils
    finally:
        nltk.download = download
    return niah_utils


def _harness() -> tuple[Any, Any, Callable[..., dict[str, float]]]:
    """lm-eval's request, model and scoring.

    Raises:
        DRTError: it is not installed.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks.ruler.common_utils import process_results
    except ImportError as error:
        raise DRTError(f'RULER needs lm-eval: pip install "drt-lm[lm-eval]" ({error})') from error
    return Instance, HFLM, process_results
