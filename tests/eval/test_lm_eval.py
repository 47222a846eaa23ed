"""lm-eval on the package's models: scored answers and generated ones are of one function, which is `generate`'s."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from drt.errors import DRTError
from drt.eval import lm_eval
from drt.eval.lm_eval import DRTLM
from drt.models.drt import DRTForCausalLM
from drt.models.loading import shipped_checkpoint

CONTEXT = "Once upon a time, in a land far away,"
# Contexts with several answers, an answer of one token, texts that are one and break at different places, no context.
PAIRS = [
    (CONTEXT, " there was"),
    (CONTEXT, " a dragon who ate"),
    (CONTEXT, " x"),
    ("The grass is", " green and long, so that nobody sees what is in it"),
    ("ab", "c"),
    ("a", "bX"),
    ("a", "bc"),
    ("", "nothing before it"),
]
BASELINES = ["window", "full_attention", "landmark", "block_recurrent"]


@pytest.fixture(scope="module")
def bytes_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


def by_hand(model: Any, tokenizer: Any, context: str, answer: str, closes: bool) -> tuple[float, bool]:
    """From one pass over everything without a cache."""
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (context, answer))
    before = before or [tokenizer.eos_token_id]  # lm-eval's way with no context
    ids = torch.tensor([before + after])
    ends = torch.zeros(ids.shape, dtype=torch.bool)
    ends[0, len(before) - 1] = closes and context != ""
    with torch.no_grad():
        logits = model(ids, chunk_ends=ends, use_cache=False).logits[0, len(before) - 1 : -1]
    wanted = torch.tensor(after)
    chosen = logits.float().log_softmax(-1).gather(1, wanted.unsqueeze(1))
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def scores(harness: DRTLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return harness.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_answer_is_scored_as_it_would_be_generated(
    model: DRTForCausalLM,
    bytes_tokenizer: ByT5Tokenizer,
    closes: bool,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_eval, "READ_TOKENS", 16)
    monkeypatch.setattr(lm_eval, "SCORED_TOKENS", 4)
    harness = DRTLM(model, tokenizer=bytes_tokenizer, batch_size=batch_size, close_prompt=closes)
    found = scores(harness, PAIRS)
    for (context, answer), (score, greedy) in zip(PAIRS, found, strict=True):
        expected, best = by_hand(model, bytes_tokenizer, context, answer, closes)
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy is best
    differing = by_hand(model, bytes_tokenizer, *PAIRS[0], not closes)[0]
    assert found[0][0] != pytest.approx(differing, rel=1e-3), "whether the chunk closes matters"


@pytest.mark.parametrize("closes", [None, True, False])
def test_what_is_generated_is_the_likeliest(
    model: DRTForCausalLM, bytes_tokenizer: ByT5Tokenizer, closes: bool | None
) -> None:
    harness = DRTLM(model, tokenizer=bytes_tokenizer, close_prompt=closes)
    assert harness.close_prompt is (closes is not False), (
        "of the generation configuration, unless it is given"
    )
    ids = torch.tensor([bytes_tokenizer.encode(CONTEXT, add_special_tokens=False)])
    said = model.generate(ids, max_new_tokens=12, do_sample=False, close_prompt=closes)[0, ids.shape[1] :]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    request = Instance("generate_until", {}, (CONTEXT, settings), 0)
    (text,) = harness.generate_until([request], disable_tqdm=True)
    assert text == bytes_tokenizer.decode(said, skip_special_tokens=True)
    ((_, greedy),) = harness._loglikelihood_tokens([((CONTEXT, ""), ids[0].tolist(), said.tolist())], True)
    assert greedy


def test_a_text_without_a_prompt_closes_nothing(
    model: DRTForCausalLM, bytes_tokenizer: ByT5Tokenizer
) -> None:
    harness = DRTLM(model, tokenizer=bytes_tokenizer)
    request = Instance("loglikelihood_rolling", {}, (CONTEXT,), 0)
    (found,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert found == pytest.approx(by_hand(model, bytes_tokenizer, "", CONTEXT, True)[0], rel=1e-4)


@pytest.mark.parametrize("model_type", BASELINES)
def test_baselines_have_no_chunk_to_close(bytes_tokenizer: ByT5Tokenizer, model_type: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    harness = DRTLM(model, tokenizer=bytes_tokenizer, batch_size=3)
    assert harness.close_prompt is False
    for (context, answer), found in zip(PAIRS, scores(harness, PAIRS), strict=True):
        expected = by_hand(model, bytes_tokenizer, context, answer, False)
        assert found == (pytest.approx(expected[0], rel=1e-4), expected[1])
    request = Instance("generate_until", {}, (CONTEXT, {"until": [], "max_gen_toks": 3}), 0)
    assert len(harness.generate_until([request], disable_tqdm=True)) == 1


def test_texts_beyond_max_length_are_cut_with_a_warning(
    model: DRTForCausalLM, bytes_tokenizer: ByT5Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert DRTLM(model, tokenizer=bytes_tokenizer).max_length == model.config.max_position_embeddings
    harness = DRTLM(model, tokenizer=bytes_tokenizer, max_length=20)
    with caplog.at_level(logging.WARNING, "drt"):
        ((score, _),) = scores(harness, [(CONTEXT, " there")])
    assert f"the first {len(CONTEXT) - 15} tokens" in caplog.text
    assert score == pytest.approx(by_hand(model, bytes_tokenizer, CONTEXT[-15:], " there", True)[0], rel=1e-4)
    with pytest.raises(DRTError, match=r"continuation of 1 to 20 tokens, got 37 and 21"):
        scores(harness, [(CONTEXT, "x" * 21)])


def test_what_it_cannot_do_is_refused(model: DRTForCausalLM, bytes_tokenizer: ByT5Tokenizer) -> None:
    for size in ("auto", 0, "auto:4"):
        with pytest.raises(DRTError, match="batch_size: expected a number"):
            DRTLM(model, tokenizer=bytes_tokenizer, batch_size=size)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes))
    with pytest.raises(DRTError, match="got LlamaForCausalLM; use hf"):
        DRTLM(other, tokenizer=bytes_tokenizer)


def test_lm_eval_knows_it_by_name() -> None:
    assert get_model("drt") is DRTLM
    harness = get_model("drt").create_from_arg_string(
        f"pretrained={shipped_checkpoint()},backend=causal,device=cpu"
    )
    assert (type(harness), harness.max_length, harness.close_prompt) == (DRTLM, 2**24, True)


def test_a_name_that_is_no_folder_is_not_looked_for_on_the_network() -> None:
    with pytest.raises(DRTError, match="no checkpoint folder at gpt2"):
        DRTLM("gpt2")
