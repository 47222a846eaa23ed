"""A program that sets a default device: the bookkeeping stays on the CPU, the tensors where the model is.

The meta device stands in for a GPU: what is made without naming a device lands there, and then cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drt.memory import DeviceStore, HostStore
from drt.models.drt import DRTCache
from drt.models.reading import read_text

MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Made after everything else: what a test's body makes without naming a device is lost."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_baseline) -> PreTrainedModel:
    return make_baseline(request.param)


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[0, :5] = 0
    return mask


@pytest.fixture
def positions() -> Tensor:
    return torch.arange(45) % 20


def test_passes(model, ids, mask, positions, elsewhere):
    for training in (False, True):
        model.train(training)
        for more in (
            {},
            {"attention_mask": mask},
            {"attention_mask": mask.flip(1)},
            {"position_ids": positions},
        ):
            loss = model(ids, labels=ids, num_items_in_batch=40, **more).loss
            assert loss.device.type == "cpu"
            loss.backward()


def test_guidance(make_baseline, ids, request):
    model, targets = make_baseline("drt"), torch.tensor([[0, 40, 3]])
    request.getfixturevalue("elsewhere")
    assert model(ids, retrieval_targets=targets, use_cache=False).retrieval_loss.device.type == "cpu"


@torch.no_grad()
def test_generation(model, ids, mask, elsewhere):
    for more in ({}, {"prefill_chunk_size": 10}):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **more)
        assert found.device.type == "cpu"


@pytest.mark.parametrize("store", [DeviceStore, HostStore])
@pytest.mark.parametrize("retriever", ["learned", "random", "bm25"])
@torch.no_grad()
def test_chunk_memories(make_baseline, ids, store, retriever, request):
    model = make_baseline("drt", retriever=retriever, num_hidden_layers=1).float()
    expected = model(ids, use_cache=False).logits[:, -1]
    request.getfixturevalue("elsewhere")
    cache = DRTCache(model.config, store(page_size=3, dtype="float32"))
    read_text(model, ids[:, :30], 12, cache)
    found = model(ids[:, 30:], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
