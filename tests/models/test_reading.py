"""Reading in segments gives what reading in one pass gives, and bad input is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt.models.reading import read_and_generate


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
