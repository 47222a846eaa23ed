"""A tiny model that generates something else for every text, its tokenizer, and a text of words in no order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from drt.data.haystack import Haystack
from drt.eval.results import NeedleRecord
from drt.models.drt import DRTConfig, DRTForCausalLM

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_lower_layers": 1,
    "num_upper_layers": 2,
    "num_groups": 2,
    "num_encoder_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "chunk_size": 15,
    "retrieval_top_k": 2,
    "sliding_window": 24,
}


@pytest.fixture(scope="package")
def model() -> DRTForCausalLM:
    torch.manual_seed(0)
    model = DRTForCausalLM(DRTConfig(**CONFIG, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # logits that differ enough to choose by
    return model.eval()


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerBase:
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="package")
def haystack() -> Haystack:
    words = ["chunk", "window", "reads", "the", "a", "memory", "of", "long", "texts", "and", "forgets"]
    drawn = np.random.default_rng(0).choice(words, size=800)
    return Haystack(" ".join(drawn).encode(), ("words",))


@pytest.fixture
def make_record() -> Callable[..., NeedleRecord]:
    """A record with defaults: `make_record(task="single", depth=0.1, ...)`."""
    values: dict[str, Any] = {
        "task": "single",
        "length": 1024,
        "depth": 0.5,
        "index": 0,
        "seed": 7,
        "expected": "12345",
        "generated": "1234é",
        "correct": False,
        "tokens_per_second": 1024.5,
        "prefill_seconds": 1.0,
        "decode_seconds_per_token": 0.25,
        "peak_rss_bytes": 10**9,
        "peak_device_bytes": None,
        "batch_size": 1,
        "checkpoint": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "haystack": ["words"],
        "settings": {},
    }
    return lambda **changes: NeedleRecord(**values | changes)
