"""RULER's texts and scores, as lm-eval makes them, and the live model that answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

pytest.importorskip("lm_eval")

from drt.errors import DRTError
from drt.eval import ruler
from drt.models.drt import DRTForCausalLM

LENGTH = 3072


def test_variables_are_asked_and_answers_scored(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tasks": ["ruler_vt"], "lengths": [LENGTH], "samples": 2, "seed": 3, "checkpoint": "tiny"}
    documents = ruler.make_documents("ruler_vt", tokenizer, LENGTH, 2, 3)
    records = list(ruler.evaluate_ruler(model, tokenizer, **options, batch_size=2))
    assert [(r.task, r.data, r.index, r.length) for r in records] == [
        ("ruler_vt", "RULER", 0, LENGTH),
        ("ruler_vt", "RULER", 1, LENGTH),
    ]
    for record, document in zip(records, documents, strict=True):
        assert record.expected == document["outputs"]
        assert record.generated
        assert record.scores == {"recall": 0.0}  # it knows nothing
        prompt = f"{document['input']} {document['gen_prefix']}"
        assert LENGTH / 2 < len(tokenizer.encode(prompt)) <= LENGTH
        assert all(f"VAR {name}" in document["input"] for name in document["outputs"])

    def answer(self: object, requests: list[object], disable_tqdm: bool) -> list[str]:
        return [" ".join(document["outputs"][:3]) for document in documents]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", answer)
    records = list(ruler.evaluate_ruler(model, tokenizer, **options))
    assert [record.scores["recall"] for record in records] == [3 / 5, 3 / 5]


@pytest.mark.slow
def test_needles_are_in_the_text_and_a_seed_repeats_them(tokenizer: PreTrainedTokenizerBase) -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        documents = ruler.make_documents(task, tokenizer, LENGTH, 1, 3)
        assert documents == ruler.make_documents(task, tokenizer, LENGTH, 1, 3)
        assert documents != ruler.make_documents(task, tokenizer, LENGTH, 1, 4)
        (value,) = documents[0]["outputs"]
        assert value in documents[0]["input"]
        assert LENGTH / 2 < len(tokenizer.encode(documents[0]["input"])) <= LENGTH


def test_the_global_generators_are_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    ruler.make_documents("ruler_vt", tokenizer, LENGTH, 1, 3)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_what_cannot_be_asked(model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"lengths": [LENGTH], "samples": 1, "seed": 0, "checkpoint": "tiny"}
    with pytest.raises(DRTError, match=r"wanted tasks of niah_multikey_2, .* got qa_squad"):
        list(ruler.evaluate_ruler(model, tokenizer, tasks=["qa_squad"], **options))
    with pytest.raises(DRTError, match=r"ruler_vt at 600 tokens: wanted at least [0-9]+ tokens"):
        list(ruler.evaluate_ruler(model, tokenizer, tasks=["ruler_vt"], **options | {"lengths": [600]}))
