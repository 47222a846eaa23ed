"""The texts of RULER, as lm-eval makes them, for the tasks that need no download."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.haystack import sample_haystack
from drt.data.json_rows import json_rows, text_field_of
from drt.errors import DRTError

_UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
_MORE_ROOM = 1.5  # of an answer's tokens: other separators than the expected ones, numbers of a list
_LEAST_WORDS = 100  # of fwe: with fewer the most frequent ones come equally often


@dataclass(frozen=True)
class Question:
    """A question on a text.

    Attributes:
        question: to be asked.
        answers: each of them is right.
        context: the text.
        title: what the texts that are most like it have in common.
    """

    question: str
    answers: tuple[str, ...]
    context: str
    title: str = ""


@dataclass(frozen=True)
class _Request:
    """What is asked of a task's function.

    Attributes:
        task: its name.
        module: lm-eval's.
        tokenizer: counts lengths.
        length: tokens of a text, the room for the answer included.
        samples: texts.
        room: tokens of the answer.
        questions: of the task qa.
    """

    task: str
    module: Any
    tokenizer: PreTrainedTokenizerBase
    length: int
    samples: int
    room: int
    questions: Sequence[Question]

    def count(self, *texts: str) -> int:
        """Tokens of texts."""
        return sum(len(self.tokenizer(text).input_ids) for text in texts)

    def check(self, wanted: float, of_what: str) -> None:
        """Refuse a length that is too short; lm-eval would look for a text that fits for ever, or make none."""
        if self.length < wanted:
            raise ValueError(f"expected at least {ceil(wanted)} tokens, for {of_what} and the answer")


def make_documents(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    seed: int,
    questions: Sequence[Question] = (),
) -> list[dict[str, Any]]:
    """Texts of a task: `input`, `gen_prefix` (how the answer begins) and `outputs` (what it must hold; of qa, one).

    Args:
        task: of `TASKS`.
        tokenizer: counts the length.
        length: tokens of a text, the room for the answer included.
        samples: how many.
        seed: of them; lm-eval draws from the global generators, whose state is put back.
        questions: of the task `ruler_qa`.

    Raises:
        DRTError: so many texts do not fit into that length, or there are fewer questions.
    """
    chosen = TASKS[task]
    room = answer_room(task, tokenizer, questions)
    try:
        # lm-eval prints how it searches for the length.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            module = _import(chosen.module)  # before the seed: what is imported draws random numbers too
            with _seeded(seed):
                made = chosen.make(_Request(task, module, tokenizer, length, samples, room, questions))
    except ValueError as error:
        raise DRTError(f"{task} at {length} tokens: {error}") from error
    if len(made) < samples:
        raise DRTError(
            f"{task} at {length} tokens: only {len(made)} of {samples} texts fit; expected a larger length"
        )
    return made


def answer_room(task: str, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question] = ()) -> int:
    """Tokens that a model may generate: the benchmark's number, or more where the answer takes more in its tokens.

    The benchmark's are for tokens of several letters: of bytes the five names of `ruler_vt` take more than its 30.

    Args:
        task: of `TASKS`.
        tokenizer: the model's.
        questions: of the task `ruler_qa`.
    """
    chosen = TASKS[task]
    answers = [answer for question in questions for answer in question.answers] or [chosen.answer]
    longest = max(answers, key=len) if task == "ruler_qa" else chosen.answer
    tokens = len(tokenizer.encode(f" {longest}", add_special_tokens=False))
    return max(chosen.tokens, ceil(_MORE_ROOM * tokens))


def read_questions(paths: Sequence[Path | str]) -> list[Question]:
    """Questions of SQuAD's kind out of JSON lines: `question`, `context`, `answers` (texts, or SQuAD's `text` list of
    them), and `title` if there is one. Rows with `is_impossible` or without an answer are left out.

    Raises:
        DRTError: a file cannot be read, a row lacks a field, or no question is left.
    """
    found = []
    for path in paths:
        for where, row in json_rows(path):
            answers = row.get("answers")
            if isinstance(answers, dict):
                answers = answers.get("text")
            if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
                raise DRTError(f"{where}: expected a list of texts in the field 'answers'")
            texts = [text_field_of(row, field, where) for field in ("question", "context")]
            kept = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
            if kept and not row.get("is_impossible"):
                found.append(Question(texts[0], kept, texts[1], str(row.get("title", ""))))
    if not found:
        raise DRTError(f"{', '.join(map(str, paths))}: expected questions with answers, got none")
    return found


def _needles(request: _Request) -> list[dict[str, Any]]:
    kind, key, value = {
        "niah_single_1": ("repeat", "words", "numbers"),
        "niah_multikey_2": ("needle", "words", "numbers"),
        "niah_multikey_3": ("needle", "uuids", "uuids"),
    }[request.task]
    niah = request.module
    haystack = niah.get_haystack(type_haystack=kind)
    options = {"type_haystack": kind, "type_needle_k": key, "type_needle_v": value, "template": niah.TEMPLATE}
    make = import_module("lm_eval.tasks.ruler.prepare_niah").generate_input_output
    with _seeded(0):  # what is drawn here changes nothing of the texts
        shortest, _, _ = make(1, haystack, num_needle_k=1, num_needle_v=1, **options)
    request.check(1.05 * request.count(shortest) + request.room, "the shortest text")  # words vary in length
    made: list[dict[str, Any]] = niah.generate_samples(
        haystack,
        TOKENIZER=request.tokenizer,
        max_seq_length=request.length,
        num_samples=request.samples,
        tokens_to_generate=request.room,
        **options,
    )
    return made


def _variable_tracking(request: _Request) -> list[dict[str, Any]]:
    module, make = request.module, request.module.sys_vartrack_w_noise_random
    # lm-eval gives the example 500 tokens, which is too few where tokens are bytes, and then never ends.
    text, names = module.generate_input_output(5, 1, 4, is_icl=True)
    most = max(500, int(1.1 * (request.count(f"{text} {names}") + request.room)))
    example = make(tokenizer=request.tokenizer, num_samples=1, max_seq_length=most, incremental=5)[0]
    shown = example["input"] + " " + " ".join(example["outputs"])
    smallest, _ = module.generate_input_output(10, 1, 4)
    # Names and numbers vary a little in tokens.
    request.check(1.05 * request.count(shown, smallest) + request.room, "its example, the shortest text")
    made: list[dict[str, Any]] = make(
        tokenizer=request.tokenizer,
        num_samples=request.samples,
        max_seq_length=request.length,
        tokens_to_generate=request.room,
        icl_example=example,
    )
    return made


def _frequent_words(request: _Request) -> list[dict[str, Any]]:
    module, room = request.module, request.room
    vocabulary = max(request.length // 50, 5)
    options = {"tokenizer": request.tokenizer, "vocab_size": vocabulary}
    shortest, _, _ = module.generate_input_output(2**40, num_words=_LEAST_WORDS, **options)
    request.check(1.05 * request.count(shortest) + room, f"a text of {_LEAST_WORDS} words")
    # lm-eval leaves the answer out of the length here.
    made: list[dict[str, Any]] = module.sys_kwext(
        max_seq_length=request.length - room, num_samples=request.samples, tokens_to_generate=room, **options
    )
    return [document | {"max_length": request.length} for document in made]


def _common_words(request: _Request) -> list[dict[str, Any]]:
    """With a word list of ours, which no other package's version changes."""
    module = request.module
    words, order, make = module.WORDS, module.RNG, module.generate_input_output
    module.WORDS, module.RNG = _book_words(), random.Random(random.getrandbits(64))

    def least(length: int) -> float:
        example, shortest, _ = make(10, length)
        return 1.1 * request.count(example, shortest) + request.room  # words vary in length

    try:
        if request.length < least(request.length):
            # From 4,096 tokens on lm-eval repeats words more often, which bytes have no room for yet.
            request.check(least(0), "its example, the shortest text")
            module.generate_input_output = lambda number, _: make(number, 0)
        made: list[dict[str, Any]] = module.sys_word_pair_random(
            num_samples=request.samples,
            max_seq_length=request.length,
            tokenizer=request.tokenizer,
            tokens_to_generate=request.room,
        )
    finally:
        module.WORDS, module.RNG, module.generate_input_output = words, order, make
    return made


def _book_words() -> list[str]:
    """Words of the novels that ship with the package, in an order that tells nothing."""
    text = sample_haystack().text.decode()
    words = sorted({word for word in re.findall(r"[\w\u2019'-]+", text) if re.fullmatch("[a-z]{4,10}", word)})
    random.Random(0).shuffle(words)
    return words


def _answers_to_questions(request: _Request) -> list[dict[str, Any]]:
    if not request.questions:
        raise ValueError("expected questions (drt eval ruler --questions FILE), got none")
    if len(request.questions) < request.samples:
        raise ValueError(f"expected {request.samples} questions, got {len(request.questions)}")
    texts = sorted({question.context for question in request.questions})
    number = {text: index for index, text in enumerate(texts)}
    asked = random.sample(list(request.questions), request.samples)
    like: dict[str, set[int]] = {question.title: set() for question in asked}
    for question in request.questions:
        if question.title in like:
            like[question.title].add(number[question.context])
    rows = [
        {
            "query": question.question,
            "outputs": list(question.answers),
            "context": [number[question.context]],
            "more_context": sorted(like[question.title] - {number[question.context]}),
        }
        for question in asked
    ]
    alone = (request.module.generate_input_output(row, 1, rows, texts)[0] for row in range(len(rows)))
    request.check(max(map(request.count, alone)) + request.room, "the longest text that is asked about")
    made: list[dict[str, Any]] = request.module.generate_samples(
        request.tokenizer,
        docs=texts,
        qas=rows,
        max_seq_length=request.length,
        num_samples=request.samples,
        tokens_to_generate=request.room,
        incremental=max(1, min(10, request.length // 2**14)),  # texts added at once in search of the length
    )
    return made


@dataclass(frozen=True)
class _Task:
    """A task of RULER.

    Attributes:
        make: its texts.
        module: lm-eval's, which makes them.
        tokens: of an answer, as the benchmark has them.
        answer: one as long as any.
    """

    make: Callable[[_Request], list[dict[str, Any]]]
    module: str
    tokens: int
    answer: str


TASKS = {
    "niah_single_1": _Task(_needles, "niah_utils", 128, "1234567"),
    "niah_multikey_2": _Task(_needles, "niah_utils", 128, "1234567"),
    "niah_multikey_3": _Task(_needles, "niah_utils", 128, _UUID),
    "ruler_vt": _Task(_variable_tracking, "vt_utils", 30, "QWXZK, VJPQY, ZXCVB, KJHGF, WQRTY"),
    "ruler_fwe": _Task(_frequent_words, "fwe_utils", 50, "1. qwxzkv 2. jpqyzx 3. cvbkjh"),
    "ruler_cwe": _Task(
        _common_words, "cwe_utils", 120, " ".join(f"{number}. thoughtful" for number in range(1, 11))
    ),
    "ruler_qa": _Task(_answers_to_questions, "qa_utils", 32, "an answer"),
}


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


def _import(name: str) -> Any:
    """A module of lm-eval that makes texts.

    The needles' module fetches a sentence splitter as it is imported, which only the tasks with essays use, and waits
    minutes for it where there is no network: it is told that there is none.

    Raises:
        DRTError: lm-eval or what it needs is not installed.
    """
    try:
        import nltk

        download, nltk.download = nltk.download, lambda *_, **__: False
        try:
            return import_module(f"lm_eval.tasks.ruler.{name}")
        finally:
            nltk.download = download
    except ImportError as error:
        raise DRTError(f'RULER needs lm-eval: pip install "drt-lm[lm-eval]" ({error})') from error
