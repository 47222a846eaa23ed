"""The needle evaluation: what it asks, how it scores, what it goes on with, and that batching changes no answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from drt.data.haystack import Haystack
from drt.errors import DRTError
from drt.eval.needle import NeedlePlan, evaluate_needles, finished_keys
from drt.eval.results import NeedleRecord, from_line, to_line
from drt.memory import DeviceStore
from drt.models.drt import DRTForCausalLM

PLAN = NeedlePlan(tasks=("single", "multihop"), lengths=(260, 170), samples=3, seed=5)
Evaluate = Callable[..., list[NeedleRecord]]


@pytest.fixture
def evaluate(model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, haystack: Haystack) -> Evaluate:
    """`evaluate_needles` on the tiny model."""

    def evaluate(plan: NeedlePlan = PLAN, **options: Any) -> list[NeedleRecord]:
        return list(evaluate_needles(model, tokenizer, haystack, plan, **{"checkpoint": "tiny"} | options))

    return evaluate


@pytest.fixture(scope="module")
def together(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, haystack: Haystack
) -> list[NeedleRecord]:
    """The records of `PLAN`, three texts read at a time."""
    return list(evaluate_needles(model, tokenizer, haystack, PLAN, checkpoint="tiny", batch_size=3))


def asked(records: list[NeedleRecord]) -> list[tuple[Any, ...]]:
    """What does not depend on how fast it went."""
    return [(r.task, r.length, r.depth, r.index, r.expected, r.generated, r.correct) for r in records]


def answer_right(prompt: str) -> str:
    """What the question at the end of a prompt asks for."""
    name = prompt[-4:].strip("|?>")
    if prompt.endswith("?"):
        (value,) = re.findall(rf"\|{name}=(\d{{5}})\|", prompt)
        return value
    names = []
    while found := re.search(rf"\|{name}>(..)\|", prompt):
        name = found[1]
        names.append(name)
    return ">".join(names)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, model: DRTForCausalLM) -> Callable[[Callable[[str], str]], None]:
    """Makes the model generate what a function of the prompt gives, and nothing it read."""

    def install(answer: Callable[[str], str]) -> None:
        def generate(ids: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
            given = [answer(bytes(row - 3 for row in prompt).decode()) for prompt in ids.tolist()]
            rows = [[byte + 3 for byte in text.encode()] + [0] * max_new_tokens for text in given]
            new = torch.tensor([row[:max_new_tokens] for row in rows])
            return torch.cat([ids, new], dim=1)

        monkeypatch.setattr(model, "generate", generate)

    return install


def test_records_say_what_was_asked(evaluate: Evaluate) -> None:
    records = evaluate(segment_size=300)
    assert [(r.length, r.task, r.index) for r in records] == [
        (length, task, index) for length in (170, 260) for task in PLAN.tasks for index in range(3)
    ]
    for record in records:
        assert record.depth == (record.index + 0.5) / 3
        assert record.settings == ({} if record.task == "single" else {"hops": 2, "chains": 2})
        assert re.fullmatch(r"\d{5}" if record.task == "single" else "[a-z]{2}>[a-z]{2}", record.expected)
        assert len(record.generated) <= len(record.expected)
        assert (record.seed, record.checkpoint, record.haystack) == (5, "tiny", ["words"])
        assert (record.device, record.dtype, record.batch_size) == ("cpu", "float32", 1)
        assert record.peak_device_bytes is None
        assert record.peak_rss_bytes > 10**7
        assert record.tokens_per_second == pytest.approx(record.length / record.prefill_seconds)
        assert record.decode_seconds_per_token > 0
        assert from_line(to_line(record)) == record
    assert len({record.expected for record in records}) == len(records)


def test_settings_are_those_that_the_task_uses(evaluate: Evaluate) -> None:
    plan = NeedlePlan(
        tasks=("multikey", "multihop"), lengths=(300,), samples=1, seed=0, needles=3, hops=4, chains=1
    )
    multikey, multihop = evaluate(plan)
    assert multikey.settings == {"needles": 3}
    assert multihop.settings == {"hops": 4, "chains": 1}
    assert multihop.expected.count(">") == 3


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 5}, {"segment_size": 100}],
)
def test_how_the_texts_are_read_changes_no_answer(
    evaluate: Evaluate, together: list[NeedleRecord], options: dict[str, int]
) -> None:
    assert {record.batch_size for record in together} == {3}
    assert len({record.generated for record in together}) > 6  # the model does not always say the same
    assert asked(evaluate(**options)) == asked(together)


def test_without_a_batch_size_as_many_are_read_as_fit_a_segment(evaluate: Evaluate) -> None:
    sizes = [(r.length, r.batch_size) for r in evaluate(segment_size=400) if r.task == "single"]
    assert sizes == [(170, 2), (170, 2), (170, 1), (260, 1), (260, 1), (260, 1)]


def test_progress_counts_every_token_once(evaluate: Evaluate) -> None:
    for options in ({"batch_size": 3, "segment_size": 100}, {"segment_size": 200}):
        steps: list[int] = []
        evaluate(on_progress=steps.append, **options)
        assert sum(steps) == 2 * 3 * (170 + 260)
        assert max(steps) <= options["segment_size"]


def test_an_answer_counts_when_it_is_right(
    evaluate: Evaluate, answers: Callable[[Callable[[str], str]], None]
) -> None:
    answers(answer_right)
    records = evaluate(
        NeedlePlan(tasks=("single", "multikey", "multihop"), lengths=(300,), samples=4, seed=1)
    )
    assert [record.generated for record in records] == [record.expected for record in records]
    assert all(record.correct for record in records)


def test_what_follows_the_answer_does_not_count(
    evaluate: Evaluate, answers: Callable[[Callable[[str], str]], None]
) -> None:
    answers(lambda prompt: answer_right(prompt) + "| and more")
    assert all(record.correct and record.generated == record.expected for record in evaluate())


@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_wrong_token_is_a_wrong_answer(
    evaluate: Evaluate, answers: Callable[[Callable[[str], str]], None], place: int
) -> None:
    def almost(prompt: str) -> str:
        right = answer_right(prompt)
        return right[:place] + "#" + right[place + 1 :]

    answers(almost)
    assert not any(record.correct for record in evaluate())


def test_a_text_ended_early_is_a_wrong_answer(
    evaluate: Evaluate, answers: Callable[[Callable[[str], str]], None]
) -> None:
    answers(lambda prompt: answer_right(prompt)[:-1])
    assert not any(record.correct for record in evaluate())


def test_other_language_models_can_be_asked(tokenizer: PreTrainedTokenizerBase, haystack: Haystack) -> None:
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    plan = NeedlePlan(tasks=("single",), lengths=(200,), samples=2, seed=0)
    llama = LlamaForCausalLM(config).eval()
    records = list(
        evaluate_needles(llama, tokenizer, haystack, plan, checkpoint="llama", segment_size=64, batch_size=2)
    )
    assert [record.checkpoint for record in records] == ["llama", "llama"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_chunks_are_held_as_it_is_told(
    evaluate: Evaluate, together: list[NeedleRecord], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """In float32 nothing changes; the records say how."""
    made: list[str | None] = []
    init = DeviceStore.__init__

    def recorded(store: DeviceStore, page_size: int | None = None, dtype: str | None = None) -> None:
        made.append(dtype)
        init(store, page_size, dtype)

    monkeypatch.setattr(DeviceStore, "__init__", recorded)
    records = evaluate(batch_size=3, memory_dtype=dtype)
    assert made == [dtype] * 4, "a memory for each batch"
    assert {record.memory_dtype for record in records} == {dtype}
    assert from_line(to_line(records[0])) == records[0]
    if dtype == "float32":
        assert asked(records) == asked(together)


def test_a_memory_that_cannot_be_is_refused(
    evaluate: Evaluate, tokenizer: PreTrainedTokenizerBase, haystack: Haystack
) -> None:
    with pytest.raises(DRTError, match=r"memory_dtype.*int8, got 'int4'"):
        evaluate(memory_dtype="int4")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
        )
    ).eval()
    with pytest.raises(DRTError, match="LlamaForCausalLM has no chunk memory"):
        evaluate_needles(llama, tokenizer, haystack, PLAN, checkpoint="llama", memory_dtype="int8")


def test_what_was_answered_is_not_asked_again(evaluate: Evaluate, together: list[NeedleRecord]) -> None:
    earlier = together[:7]
    done = finished_keys(earlier, PLAN, checkpoint="tiny", dtype="float32", haystack=["words"])
    assert len(done) == 7
    assert asked(evaluate(batch_size=3, done=done)) == asked(together[7:])
    assert evaluate(done=PLAN.sample_keys()) == []


def test_a_longer_plan_goes_on_with_a_shorter_ones_records(together: list[NeedleRecord]) -> None:
    longer = dataclasses.replace(PLAN, tasks=("multikey", "multihop"), lengths=(170, 900))
    some = [record for record in together if record.task == "multihop" and record.length == 170]
    done = finished_keys(some, longer, checkpoint="tiny", dtype="float32", haystack=["words"])
    assert done == {("multihop", 170, index) for index in range(3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, r"seed is 5 there .* and 6 here"),
        ({"samples": 4}, r"depth is 0\.16\d+ there .* and 0\.125 here"),
        ({"hops": 3}, r"settings is .*'hops': 2.* there .multihop, 170 tokens, sample 0. and .*'hops': 3"),
        ({"checkpoint": "other"}, r"checkpoint is 'tiny' there .* and 'other' here"),
        ({"dtype": "bfloat16"}, r"dtype is 'float32' there .* and 'bfloat16' here"),
        ({"memory_dtype": "int8"}, r"memory_dtype is None there .* and 'int8' here"),
        ({"haystack": ["a.txt"]}, r"haystack is \['words'\] there .* and \['a\.txt'\] here"),
    ],
)
def test_records_of_another_evaluation_are_refused(
    together: list[NeedleRecord], changes: dict[str, Any], message: str
) -> None:
    names = {"checkpoint": "tiny", "dtype": "float32", "haystack": ["words"], "memory_dtype": None}
    plan = dataclasses.replace(PLAN, **{key: value for key, value in changes.items() if key not in names})
    assert finished_keys(together, PLAN, **names)
    with pytest.raises(DRTError, match=message):
        finished_keys(together, plan, **names | {k: v for k, v in changes.items() if k in names})


def test_records_of_another_task_are_refused(make_record: Callable[..., NeedleRecord]) -> None:
    record = make_record(task="perplexity", depth=1 / 6, seed=5)
    with pytest.raises(DRTError, match=r"settings is .* there .perplexity"):
        finished_keys([record], PLAN, checkpoint="tiny", dtype="float32", haystack=["words"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("single", "twohop")}, "expected tasks of single, multikey, multihop, got twohop"),
        ({"tasks": ()}, "expected at least one task"),
        ({"lengths": ()}, "expected at least one task, length"),
        ({"samples": 0}, "length and sample"),
    ],
)
def test_a_plan_that_asks_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DRTError, match=message):
        dataclasses.replace(PLAN, **changes)


def test_a_plan_names_each_sample_once_and_short_texts_first() -> None:
    plan = NeedlePlan(tasks=("single", "multihop", "single"), lengths=(9, 5, 9), samples=1, seed=0)
    assert plan.sample_keys() == [("single", 5, 0), ("multihop", 5, 0), ("single", 9, 0), ("multihop", 9, 0)]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dataclasses.replace(PLAN, lengths=(170, 10**5)), "too short: expected 100000 tokens"),
        (dataclasses.replace(PLAN, lengths=(170, 20)), "length 20 is too short for multihop"),
    ],
)
def test_what_cannot_be_asked_is_known_before_anything_is_read(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    plan: NeedlePlan,
    message: str,
) -> None:
    with pytest.raises(DRTError, match=message):
        evaluate_needles(model, tokenizer, haystack, plan, checkpoint="tiny", on_progress=pytest.fail)


def test_options_out_of_range_are_refused(evaluate: Evaluate, model: DRTForCausalLM) -> None:
    for options in ({"segment_size": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            evaluate(**options)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            evaluate()
    finally:
        model.eval()
