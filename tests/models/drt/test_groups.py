"""Groups of upper layers of any sizes: however a text is read and wherever its chunks lie, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer

from drt.memory import DeviceStore, HostStore
from drt.models.drt import DRTCache, DRTForCausalLM
from drt.models.drt.archive_drt import describe_archive
from drt.models.reading import read_text

LENGTH, MORE = 90, 6  # read, and read after it
SHAPES: list[dict[str, Any]] = [
    {"num_upper_layers": [1, 2]},
    {"num_upper_layers": [3, 1], "landmark_predicts": False, "chunk_size": 3},
    {"num_upper_layers": [1, 2, 1], "position_embedding": "rope", "sliding_window": 3},
    {"num_upper_layers": [2, 1], "chunk_size": 9, "sliding_window": 1, "retrieval_top_k": 4},
]


@pytest.fixture(params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest, make_model: Callable[..., DRTForCausalLM]) -> DRTForCausalLM:
    return make_model(**{"num_groups": None} | request.param).double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (1, LENGTH + MORE), generator=torch.Generator().manual_seed(1))


def continued(model: DRTForCausalLM, cache: Any, ids: Tensor) -> Tensor:
    """Logits of the last tokens of a text whose others the cache has read, one at a time."""
    steps = ids[:, LENGTH:].split(1, 1)
    return torch.cat([model(step, past_key_values=cache).logits for step in steps], 1)


@pytest.mark.parametrize("cuts", [[], [1, 33, 35, 80]], ids=str)
@torch.no_grad()
def test_passes_and_tokens(model: DRTForCausalLM, ids: Tensor, cuts: list[int]) -> None:
    cache = DRTCache(model.config, DeviceStore(page_size=3))
    read = [
        model(ids[:, first:last], past_key_values=cache).logits
        for first, last in pairwise([0, *cuts, LENGTH])
    ]
    found = torch.cat([*read, continued(model, cache, ids)], 1)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_only_read_and_where_it_lies(model: DRTForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    """`read_text` runs the upper decoder over the end alone; the host and the disk keep chunks in float32."""
    whole = model(ids, use_cache=False).logits[:, LENGTH:]
    text = ids[:, :LENGTH]
    description = describe_archive(model, ByT5Tokenizer(extra_ids=0), model_name="small", dtype="float32")
    host = DRTCache(model.config, HostStore("float32", page_size=3))
    read_text(model, text, 20, host)
    host.save(tmp_path / "archive", description)
    for cache in (
        read_text(model, text, 1),
        read_text(model, text[:, 60:], 7, read_text(model, text[:, :60], LENGTH)),
        DRTCache.open(tmp_path / "archive", model),
        host,
    ):
        torch.testing.assert_close(continued(model, cache, ids), whole, rtol=1e-4, atol=1e-4)
