"""RULER (arXiv 2404.06654) through lm-eval: its texts, its scores and its way of generating, for the tasks that need
no download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.eval.results import AnswerRecord
from drt.eval.ruler_texts import TASKS, Question, answer_room, make_documents

DATA = "RULER"
MEASURE = "recall"  # share of the expected strings that the generated text holds; of qa, whether it holds any
QA = "ruler_qa"
_PREFIX = "ruler_"  # of names that may be given without it


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
    questions: Sequence[Question] = (),
) -> Iterator[AnswerRecord]:
    """Ask RULER's questions and yield a record of each. All texts are made before the first question is asked.

    `niah_single_1` hides a needle among sentences that repeat, `niah_multikey_2` and `niah_multikey_3` among needles
    that differ in their key (words and numbers, or UUIDs); `ruler_vt` follows a chain of variables; `ruler_fwe` and
    `ruler_cwe` count words; `ruler_qa` asks a question on one of many paragraphs. A text is read in one pass.

    Args:
        model: a causal language model in eval mode, on any device.
        tokenizer: the model's; lengths are counted in its tokens.
        tasks: of `TASKS`; `vt` is `ruler_vt`.
        lengths: tokens of a text, the room for the answer included.
        samples: texts of each task and length.
        seed: of the texts.
        checkpoint: name of the model, for the records.
        batch_size: texts read together.
        questions: of the task `ruler_qa`.

    Raises:
        DRTError: an unknown task, a length that a task does not fit into, too few questions, or lm-eval is not
            installed.
    """
    names = check_tasks(tasks)
    instance, harness_class, score = _harness()
    wanted = [(length, task) for length in lengths for task in names]
    made = [make_documents(task, tokenizer, length, samples, seed, questions) for length, task in wanted]
    for (length, task), documents in zip(wanted, made, strict=True):
        room = answer_room(task, tokenizer, questions)
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
                scores={MEASURE: _score(task, document, answer, score)},
            )


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The names of tasks, which may be given without `ruler_`.

    Raises:
        DRTError: an unknown one.
    """
    names = [task if task in TASKS else _PREFIX + task for task in tasks]
    unknown = [task for task, name in zip(tasks, names, strict=True) if name not in TASKS]
    if unknown:
        raise DRTError(f"expected tasks of {', '.join(TASKS)}, got {', '.join(unknown)}")
    return names


def _score(task: str, document: dict[str, Any], answer: str, score: Callable[..., dict[str, float]]) -> float:
    """The share of the outputs that an answer holds, or whether it holds any."""
    outputs = [[output] for output in document["outputs"]] if task == QA else [document["outputs"]]
    length = str(document["max_length"])
    return max(score(document | {"outputs": listed}, [answer])[length] for listed in outputs)


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
