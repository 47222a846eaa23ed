"""Small models whose every parameter matters: random norm weights, GQA; float64, so that no choice tips over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import drt.models  # noqa: F401  (registers them)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
OWN: dict[str, dict[str, object]] = {
    "drt": {"chunk_size": 7, "retrieval_top_k": 2, "sliding_window": 10, "num_encoder_layers": 1},
    "window": {"sliding_window": 10},
    "full_attention": {},
    "block_recurrent": {"sliding_window": 10, "block_size": 7, "num_states": 5},
    "landmark": {"chunk_size": 7, "retrieval_top_k": 2, "local_chunks": 1, "max_chunk_distance": 3},
}


@pytest.fixture
def make_baseline() -> Callable[..., PreTrainedModel]:
    def make(model_type: str, **changes: object) -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = SMALL | OWN[model_type] | changes
        if model_type == "drt":
            layers = sizes.pop("num_hidden_layers")
            sizes |= {"num_lower_layers": 1, "num_upper_layers": layers, "num_groups": layers}
        config = AutoConfig.for_model(model_type, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif parameter.dim() == 2:
                    parameter.mul_(8)  # scores and logits that differ enough to choose by
        return model.eval().double()

    return make
