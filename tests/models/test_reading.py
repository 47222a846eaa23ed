"""Reading in segments gives what reading in one pass gives, and bad input is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.drt.memory_drt import ChunkMemory
from drt.models.reading import read_and_generate, read_text


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        eos_token_id=None,  # never ends the text, so that every case generates five tokens
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_segments_read_like_one_pass(model: LlamaForCausalLM, length: int) -> None:
    prompt = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))
    steps: list[int] = []
    token_ids, logits = read_and_generate(model, prompt, 5, 7, on_segment=steps.append)

    expected = prompt
    for step in range(5):  # greedy without any cache
        following = model(expected).logits[:, -1:]
        torch.testing.assert_close(
            logits[:, step : step + 1], following, rtol=0, atol=1e-4
        )  # float32, about 10
        expected = torch.cat([expected, following.argmax(-1)], dim=1)
    assert torch.equal(token_ids, expected[:, length:])
    assert sum(steps) == length
    assert max(steps) <= 7


def test_bad_input_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"\(1, L\).*got \(2, 3\)"):
        read_and_generate(model, torch.ones(2, 3, dtype=torch.long), 1, 8)
    with pytest.raises(ValueError, match=r"got \(1, 0\)"):
        read_and_generate(model, torch.ones(1, 0, dtype=torch.long), 1, 8)
    with pytest.raises(ValueError, match="segment_size"):
        read_and_generate(model, torch.ones(1, 3, dtype=torch.long), 1, 0)
    with pytest.raises(ValueError, match="can generate, got LlamaModel"):
        read_and_generate(model.model, torch.ones(1, 3, dtype=torch.long), 1, 8)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            read_and_generate(model, torch.ones(1, 3, dtype=torch.long), 1, 8)
    finally:
        model.eval()


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_lower_layers": 1,
    "num_upper_layers": 2,
    "num_groups": 2,
    "num_encoder_layers": 1,
    "chunk_size": 7,
    "retrieval_top_k": 2,
    "sliding_window": 9,
    "initializer_range": 0.3,
    "eos_token_id": None,
}


@pytest.fixture(scope="module", params=[2, [1, 2]], ids=str)
def drt_model(request: pytest.FixtureRequest) -> DRTForCausalLM:
    """Random norms, GQA, two groups; a text of 100 tokens is longer than the upper decoder's reach."""
    torch.manual_seed(0)
    config = DRTConfig(**CONFIG | {"num_upper_layers": request.param})
    model = DRTForCausalLM(config).eval().double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("first", [0, 5, 60])
@pytest.mark.parametrize("length", [0, 3, 20, 100])
@torch.no_grad()
def test_what_is_only_read_is_remembered_alike(drt_model: DRTForCausalLM, length: int, first: int) -> None:
    """Two rows, after a text in the cache or none: what follows gets the logits that plain passes give."""
    ids = torch.randint(2, 64, (2, first + length + 30), generator=torch.Generator().manual_seed(length))
    plain = held = None
    if first:
        plain = drt_model(ids[:, :first], use_cache=True).past_key_values
        held = drt_model(ids[:, :first], use_cache=True).past_key_values
    text, rest = ids[:, first : first + length], ids[:, first + length :]
    if length:
        plain = drt_model(text, past_key_values=plain, use_cache=True).past_key_values
    counts: list[int] = []
    held = read_text(drt_model, text.int(), 11, held, counts.append)
    assert sum(counts) == 2 * length
    assert max(counts, default=0) <= 22
    wanted = drt_model(rest, past_key_values=plain, use_cache=True).logits
    torch.testing.assert_close(
        drt_model(rest, past_key_values=held, use_cache=True).logits, wanted, rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_the_window_alone_is_read_too() -> None:
    config = DRTConfig(**CONFIG | {"retrieval": False})
    model = DRTForCausalLM(config).eval().double()
    ids = torch.randint(2, 64, (1, 120))
    held = read_text(model, ids[:, :100], 30)
    logits = model(ids[:, 100:], past_key_values=held, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 100:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_only_the_end_of_a_text_searches_the_memory(
    drt_model: DRTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    retrieve = ChunkMemory.retrieve

    def counted(self: ChunkMemory, *arguments: object) -> object:
        searches.append(arguments[0])
        return retrieve(self, *arguments)

    monkeypatch.setattr(ChunkMemory, "retrieve", counted)
    read_text(drt_model, torch.randint(2, 64, (1, 500)), 50)
    assert searches == [0, 1]  # both groups, in the last pass
