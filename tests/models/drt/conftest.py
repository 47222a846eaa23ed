"""Small DRT models whose every parameter matters: random norm weights, several groups, GQA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from drt.models.drt import DRTConfig, DRTForCausalLM

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_lower_layers": 1,
    "num_upper_layers": 2,
    "num_groups": 2,
    "num_encoder_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "chunk_size": 7,
    "retrieval_top_k": 2,
    "sliding_window": 10,
    "learned_temperature": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def make_model() -> Callable[..., DRTForCausalLM]:
    def make(**changes: object) -> DRTForCausalLM:
        torch.manual_seed(0)
        model = DRTForCausalLM(DRTConfig(**(SMALL | changes)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif "log_temperature" in name:
                    parameter.fill_(0.7)
                elif parameter.dim() == 2:
                    parameter.mul_(8)  # scores and logits that differ enough to choose by
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 61), generator=torch.Generator().manual_seed(1))
