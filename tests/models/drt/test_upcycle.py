"""A pretrained model given a chunk memory: what is copied, and what it computes before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from drt.data.tokenizer import train_tokenizer
from drt.errors import DRTError
from drt.models.drt.base_model import align_special_tokens, load_base
from drt.models.drt.upcycle import UpcycleOptions, text_losses, upcycle

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,  # large enough for the layers to matter
}
OPTIONS = UpcycleOptions(
    num_lower_layers=2, num_groups=3, num_encoder_layers=1, chunk_size=8, sliding_window=16
)


def tiny_base(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    with torch.no_grad():  # norms that differ, so that a swap shows
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return base


def some_ids(length: int = 96) -> torch.Tensor:
    return torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(1))


def test_inside_its_first_chunk_the_conversion_computes_what_the_base_does() -> None:
    """No landmark stands there yet, so the two must agree to rounding."""
    base, ids = tiny_base(), some_ids()
    converted = upcycle(base, OPTIONS, ids, 10)
    first = ids[:, : OPTIONS.chunk_size - 1]
    with torch.no_grad():
        torch.testing.assert_close(
            converted(first, use_cache=False).logits, base(first).logits, rtol=1e-4, atol=1e-4
        )


def test_the_conversion_costs_little_beside_the_window() -> None:
    base, ids = tiny_base(), some_ids()
    losses = text_losses(base, upcycle(base, OPTIONS, ids, 10), ids)
    assert abs(losses.base - losses.base_with_window) > 1e-3  # the window matters here
    assert losses.converted == pytest.approx(losses.base_with_window, abs=0.15)


def test_the_memory_is_silent_until_it_is_trained() -> None:
    """Grouped cross-attention adds nothing, and its output projection gets a gradient all the same."""
    ids = some_ids()
    converted = upcycle(tiny_base(), OPTIONS, ids, 10)
    with torch.no_grad():
        before = converted(ids, use_cache=False).logits
        converted.model.chunk_v_proj.weight.mul_(10)
        torch.testing.assert_close(converted(ids, use_cache=False).logits, before)
    converted(ids, labels=ids, use_cache=False).loss.backward()
    for layer in converted.model.upper_layers:
        assert layer.grouped_cross_attention.o_proj.weight.grad.abs().max() > 0


def test_the_encoder_sees_the_scale_of_the_layers_that_it_was_copied_from() -> None:
    base, ids = tiny_base(), some_ids()
    converted = upcycle(base, OPTIONS, ids, 10)
    encoder = converted.model.chunk_encoder
    torch.testing.assert_close(encoder.layers[0].q_proj.weight, base.model.layers[2].self_attn.q_proj.weight)
    with torch.no_grad():
        states = base(ids, output_hidden_states=True).hidden_states[2]
    assert encoder.input_norm.weight[0].item() == pytest.approx(
        float(states.pow(2).mean(-1).sqrt().median()), rel=1e-5
    )


def test_untied_heads_and_mistral_are_converted() -> None:
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**SIZES | {"tie_word_embeddings": False})).eval()
    converted = upcycle(base, OPTIONS, some_ids(), 10)
    torch.testing.assert_close(converted.lm_head.weight, base.lm_head.weight)
    assert converted.lm_head.weight is not base.lm_head.weight


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"head_dim": 16}, "hidden_size"),
    ],
)
def test_a_base_with_other_blocks_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DRTError, match=named):
        upcycle(tiny_base(**changes), OPTIONS, some_ids(), 10)


@pytest.mark.parametrize("lower", [0, 5])
def test_the_cut_lies_inside_the_base(lower: int) -> None:
    with pytest.raises(DRTError, match=rf"got {lower}\b"):
        upcycle(tiny_base(), UpcycleOptions(num_lower_layers=lower), some_ids(), 10)


def test_a_base_is_loaded_with_its_tokenizer_and_what_it_came_from(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "base")
    model, tokenizer, source = load_base(tmp_path / "base")
    assert (model.config.model_type, len(tokenizer)) == ("llama", 259)
    assert source["name"] == "base"
    assert [len(digest) for digest in source["sha256"]] == [64]


def test_the_configuration_says_which_token_ends_a_text() -> None:
    tokenizer = train_tokenizer(["abc " * 50], 258)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    align_special_tokens(tokenizer, LlamaConfig(bos_token_id=None, eos_token_id=1, pad_token_id=0))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 1, 0)


@pytest.mark.parametrize("content", ["nothing", "folder", "damaged", "gguf"])
def test_what_is_no_base_is_named(tmp_path: Path, content: str) -> None:
    if content == "gguf":
        pytest.importorskip("gguf")
    path = tmp_path / ("base.gguf" if content == "gguf" else "base")
    if content == "folder":
        path.mkdir()
    elif content == "damaged":
        tiny_base().save_pretrained(path)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    elif content == "gguf":
        path.write_bytes(b"no such thing")
    with pytest.raises(DRTError, match=path.name):
        load_base(path)
