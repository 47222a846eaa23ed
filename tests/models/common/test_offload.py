"""Models that accelerate has offloaded: weights come for the time of a module's call."""

from __future__ import annotations

import copy
from pathlib import Path

import accelerate
import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedModel

from drt.memory import Archive, ArchiveWriter
from drt.models.drt import DRTCache
from drt.models.drt.archive_drt import describe_archive, read_documents
from drt.models.drt.fingerprint import model_fingerprint
from drt.models.reading import read_and_generate

MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]


def offloaded(model: PreTrainedModel, kind: str, folder: Path) -> PreTrainedModel:
    model = copy.deepcopy(model)
    if kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    assert model.device.type == "meta"
    return model


@pytest.fixture(params=["cpu_offload", "disk_offload"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_reading_and_answering(make_baseline, tmp_path, kind, name):
    plain = make_baseline(name).float()
    model = offloaded(plain, kind, tmp_path)
    ids = torch.randint(1, 50, (1, 145), generator=torch.Generator().manual_seed(1))
    expected = read_and_generate(plain, ids, 5, 30)
    assert torch.equal(read_and_generate(model, ids, 5, 30).token_ids, expected.token_ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_a_memory_built_and_asked_is_that_of_the_plain_model(make_baseline, tmp_path, kind):
    plain = make_baseline("drt", vocab_size=259).float()
    model, tokenizer = offloaded(plain, kind, tmp_path / "weights"), ByT5Tokenizer(extra_ids=0)
    assert model_fingerprint(model) == model_fingerprint(plain)
    text = tmp_path / "a.txt"
    text.write_text("some words of a text. " * 20)
    states = []
    for number, one in enumerate((plain, model)):
        description = describe_archive(one, tokenizer, model_name="small", segment_size=60)
        with ArchiveWriter.create(tmp_path / f"memory{number}", description) as writer:
            read_documents(one, tokenizer, writer, [text])
        with Archive.open(tmp_path / "memory0") as archive, torch.no_grad():
            cache = DRTCache.open(archive, one)
            states.append(one(torch.tensor([[70, 71, 72]]), past_key_values=cache).logits)
    torch.testing.assert_close(*states)
