"""What a user gets wrong is refused with what was expected and what was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from drt.models.drt import DRTConfig
from drt.models.loading import shipped_checkpoint

CONFIGURATIONS = [
    ({"retrieval_top_k": 0}, "retrieval_top_k must be at least 1, got 0"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
    ({"vocab_size": -3}, "vocab_size must be at least 1, got -3"),
    ({"num_lower_layers": 0}, "num_lower_layers must be at least 1, got 0"),
    ({"num_encoder_layers": -1}, "num_encoder_layers must be at least 0, got -1"),
    ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"num_attention_heads": 0}, "got 768 and 0 x"),
    ({"num_attention_heads": 5}, "hidden_size must be num_attention_heads x head_dim, got 768 and 5 x 153"),
    ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads, got 5 and 12"),
    ({"head_dim": 32}, "got 768 and 12 x 32"),
    ({"hidden_size": 36}, "head_dim must be even for rotary positions, got 3"),
    ({"num_groups": 4}, "num_groups must divide num_upper_layers, got 4 and 6"),
    ({"num_upper_layers": -1}, "num_upper_layers must be at least 0, got -1"),
    ({"num_upper_layers": [2, 0]}, "num_upper_layers must list at least 1 layer for each group, got [2, 0]"),
    ({"num_upper_layers": []}, "num_upper_layers must list at least 1 layer for each group, got []"),
    (
        {"num_upper_layers": [1, 2], "num_groups": 1},
        "num_groups must be the 2 groups that num_upper_layers lists",
    ),
    (
        {"num_upper_layers": [2, 2], "num_groups": 3},
        "num_groups must be the 2 groups that num_upper_layers lists",
    ),
    ({"num_upper_layers": [1, 2.0]}, "Field 'num_upper_layers'"),
    (
        {"num_upper_layers": [1, 2], "retriever": "bm25"},
        "num_groups must be 1 and learned_temperature False, got 2",
    ),
    ({"position_embedding": "sinus"}, """position_embedding must be "alibi" or "rope", got 'sinus'"""),
    ({"chunk_size": "63"}, "'chunk_size' expected int"),
    ({"retrieval_top_k": 2.5}, "'retrieval_top_k' expected int"),
    ({"sink": "yes"}, "'sink' expected bool"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGURATIONS, ids=str)
def test_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError) as refusal:
        DRTConfig(**changes)
    assert message in f"{refusal.value} {refusal.value.__cause__}"


def test_what_is_left_out_is_filled_in() -> None:
    config = DRTConfig()
    assert (config.num_key_value_heads, config.head_dim, config.num_hidden_layers) == (12, 64, 12)
    assert DRTConfig(num_upper_layers=6, num_groups=3).layers_per_group == [2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "layers", "groups", "per_group"),
    [
        ({}, 6, 1, [6]),
        ({"num_upper_layers": 0}, 0, 1, [0]),
        ({"num_upper_layers": [1, 2]}, [1, 2], 2, [1, 2]),
        ({"num_upper_layers": [3, 1, 2], "num_groups": 3}, [3, 1, 2], 3, [3, 1, 2]),
        ({"num_upper_layers": [2, 2]}, 4, 2, [2, 2]),  # one model, one configuration
        ({"num_upper_layers": [4]}, 4, 1, [4]),
    ],
    ids=str,
)
def test_layers_of_each_group(
    fields: dict[str, Any], layers: int | list[int], groups: int, per_group: list[int], tmp_path: Path
) -> None:
    DRTConfig(**fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_upper_layers"], saved["num_groups"]) == (layers, groups)
    config = DRTConfig.from_pretrained(tmp_path)
    assert config.layers_per_group == per_group
    assert config.num_hidden_layers == 6 + sum(per_group)


def test_a_configuration_that_lists_nothing_is_saved_as_ever(tmp_path: Path) -> None:
    """Archives are bound to their model by a digest of it."""
    DRTConfig.from_pretrained(shipped_checkpoint()).save_pretrained(tmp_path)
    found, held = (json.loads((f / "config.json").read_text()) for f in (tmp_path, shipped_checkpoint()))
    assert found | held | {"transformers_version": found["transformers_version"]} == found


def mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


INPUTS = [
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"with both at least 1, got \(2, 0\)"),
    ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"with both at least 1, got \(0, 4\)"),
    ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"\(batch, length\) tokens .*got \(4,\)"),
    ({"input_ids": torch.tensor([[0, 50]])}, r"token ids must lie in \[0, 50\), got 0 to 50"),
    ({"input_ids": torch.tensor([[3, -1]])}, r"token ids must lie in \[0, 50\), got -1 to 3"),
    ({}, "exactly one of input_ids and inputs_embeds"),
    (
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)},
        "exactly one of input_ids and inputs_embeds",
    ),
    ({"inputs_embeds": torch.zeros(1, 0, 32)}, r"got \(1, 0, 32\)"),
    ({"inputs_embeds": torch.zeros(1, 32)}, r"got \(1, 32\)"),
]


@pytest.mark.parametrize(("inputs", "message"), INPUTS, ids=str)
def test_inputs(make_model, inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


IDS = torch.ones(2, 4, dtype=torch.long)
AROUND = [
    (
        {"attention_mask": mask([1, 1, 1, 1], [1, 1, 1, 0]), "use_cache": True},
        "left padding .* got a zero after a one",
    ),
    ({"attention_mask": mask([1, 0, 1, 1], [1, 1, 1, 1])}, "got a zero between ones"),
    ({"attention_mask": mask([0, 1, 0, 1], [1, 1, 1, 1])}, "got a zero between ones"),
    (
        {"position_ids": mask([0, 1, 0, 1]), "use_cache": True},
        "one document, got position_ids that begin again",
    ),
    ({"position_ids": mask([0, 1, 3, 4])}, "got 3 after 1 in row 0"),
    ({"position_ids": mask([0, 1, 2, 3], [2, 3, 1, 2])}, "got 1 after 3 in row 1"),
    (
        {"position_ids": torch.ones(2, 3)},
        r"position_ids must have the shape of the input, \(2, 4\), got \(2, 3\)",
    ),
    ({"attention_mask": torch.ones(2, 3)}, r"\(2, 4\) for the new tokens or \(2, 4\) for all, got \(2, 3\)"),
    ({"attention_mask": torch.ones(1, 4)}, r"got \(1, 4\)"),
    ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"got \(2, 1, 4, 4\)"),
    ({"chunk_ends": torch.zeros(2, 3, dtype=torch.bool)}, r"the shape of the input, \(2, 4\), got \(2, 3\)"),
    (
        {"labels": torch.ones(2, 3, dtype=torch.long)},
        r"labels must have the shape of the input, \(2, 4\), got \(2, 3\)",
    ),
    ({"labels": torch.ones(4, 2, dtype=torch.long)}, r"labels must .* got \(4, 2\)"),
    ({"labels": torch.ones(8, dtype=torch.long)}, r"labels must .* got \(8,\)"),
]


@pytest.mark.parametrize(("inputs", "message"), AROUND, ids=str)
def test_what_goes_with_the_inputs(make_model, inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(IDS, **inputs)


@torch.no_grad()
def test_what_goes_with_a_cache(make_model) -> None:
    model = make_model()
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input has 1"):
        model(IDS[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False cannot continue"):
        model(IDS, past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match=r"\(2, 4\) for the new tokens or \(2, 8\) for all, got \(2, 7\)"):
        model(IDS, past_key_values=cache, attention_mask=torch.ones(2, 7))
    assert cache.get_seq_length() == 4, "what was refused was not read"
    model(IDS, past_key_values=cache, attention_mask=torch.ones(2, 8))
    assert cache.get_seq_length() == 8


def test_a_model_without_a_chunk_memory_remembers_nothing(make_model) -> None:
    model = make_model(retrieval=False)
    with pytest.raises(ValueError, match="retrieval=False has no chunk memory"):
        model.model.remember(IDS, model.make_cache())
