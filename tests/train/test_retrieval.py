"""A run that teaches a converted model to use its memory: loss, curriculum, low-rank changes, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import ByT5Tokenizer

from drt.data.haystack import sample_haystack
from drt.data.prepare import PrepareConfig, prepare_corpus
from drt.data.retrieval_mix import KINDS
from drt.data.sources import Source
from drt.errors import DRTError
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.loading import load_model
from drt.train.adapters import (
    add_lora,
    is_new,
    load_trained,
    merge_lora,
    read_trained,
    save_trained,
    trained_tensors,
)
from drt.train.config import load_config
from drt.train.estimate import estimate_run
from drt.train.retrieval import answer_losses
from drt.train.retrieval_config import LoraConfig
from drt.train.run import run_training


def tiny_model() -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(
        DRTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_lower_layers=1,
            num_upper_layers=2,
            num_groups=1,
            num_encoder_layers=1,
            num_attention_heads=2,
            chunk_size=15,
            retrieval_top_k=2,
            sliding_window=32,
            position_embedding="rope",
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus and a question file."""
    folder = tmp_path_factory.mktemp("retrieval")
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = sample_haystack().text
    for name, part in (("train", text[:120_000]), ("validation", text[200_000:300_000])):
        (folder / f"{name}.txt").write_bytes(part)
    sources = [Source(path=str(folder / f"{name}.txt"), split=name) for name in ("train", "validation")]
    prepare_corpus(PrepareConfig(sources=sources, tokenizer="bytes"), folder / "corpus")
    question = {
        "context": "The harbor was built by Ada Quill.",
        "question": "By whom?",
        "answers": ["Ada Quill"],
    }
    (folder / "questions.jsonl").write_text(json.dumps(question))
    return folder


def write_config(folder: Path, made: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "task": "retrieval",
        "output_dir": str(folder / "run"),
        "init_from": str(made / "model"),
        "model": {},
        "data": {
            "corpus": str(made / "corpus"),
            "questions": [str(made / "questions.jsonl")],
            "validation_questions": [str(made / "questions.jsonl")],
        },
        "lora": {"rank": 2},
        "base_lr": 1e-3,
        "guidance": 0.3,
        "guidance_until": 0.5,
        "tokens_per_step": 1024,
        "max_steps": 4,
        "log_every": 1,
        "eval_every": 4,
        "save_every": 2,
        "validation_batches": 1,
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
        "curriculum": [
            {
                "row_length": 512,
                "min_distance": 48,
                "sliding_window": 16,
                "max_steps": 2,
                "mix": {"quotes": 1},
            },
            {
                "row_length": 1024,
                "min_distance": 48,
                "mix": {"questions": 1, "missing": 1, "plain_share": 0.2},
            },
        ],
    } | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_time(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in log.items() if k not in ("seconds", "tokens_per_second")} for log in logs]


def test_a_run_trains_what_is_new_and_low_rank_changes_and_exports_a_plain_model(
    tmp_path: Path, made: Path
) -> None:
    final = run_training(load_config(write_config(tmp_path, made)), ["drt"])
    base, _ = load_model(made / "model")
    trained, _ = load_model(final)
    assert trained.config.sliding_window == 32  # the model's, not a stage's
    changed = {
        name
        for name, tensor in trained.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    }
    assert any(".chunk_encoder." in name for name in changed)
    assert "model.lower_layers.0.mlp.up_proj.weight" in changed  # by a low-rank change
    assert "model.embed_tokens.weight" not in changed
    assert "model.lower_layers.0.mlp_norm.weight" not in changed
    held = read_trained(final / "trained.safetensors").tensors
    assert held.keys() == {name for name in held if is_new(name) or ".lora_" in name}
    logs = read_log(final.parent)
    assert [log["stage"] for log in logs if "stage" in log] == [0, 0, 1, 1]
    assert {"recall", "guidance_loss", "fact_accuracy"} <= logs[0].keys()
    assert "eval_recall" in logs[-1]


def test_a_run_resumes_as_if_it_had_not_stopped(tmp_path: Path, made: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run_training(load_config(write_config(whole, made)), ["drt"])
    path = write_config(parts, made)
    run_training(load_config(path), ["drt"])
    run = parts / "run"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")
    run_training(load_config(path), ["drt"])
    assert without_time(read_log(run)) == without_time(read_log(whole / "run"))


def test_batches_of_worker_processes_are_the_same(tmp_path: Path, made: Path) -> None:
    logs = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        data = {
            "corpus": str(made / "corpus"),
            "questions": [str(made / "questions.jsonl")],
            "workers": workers,
        }
        run_training(load_config(write_config(folder, made, data=data, eval_every=0)), ["drt"])
        logs.append(without_time(read_log(folder / "run")))
    assert logs[0] == logs[1]


def test_the_estimate_is_of_the_last_stage(tmp_path: Path, made: Path) -> None:
    estimate = estimate_run(load_config(write_config(tmp_path, made, tokens_per_step=8192)), processes=2)
    assert (estimate.row_length, estimate.rows_per_pass) == (1024, 4)


def test_losses_are_means_of_kinds_and_answers_count_whole() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, 3, 4, -100], [5, 6, 0, 1, 2]])
    fact, quote = KINDS.index("fact"), KINDS.index("quote")
    kinds = torch.tensor([[0, fact, fact, fact, 0], [quote, quote, 0, 0, fact]], dtype=torch.int8)
    answers = torch.tensor([[-1, 0, 0, 1, -1], [0, 0, -1, -1, 1]], dtype=torch.int32)
    with torch.no_grad():  # the first answer of row 0 is right, of the quote one token
        for row, place in ((0, 1), (0, 2), (1, 0)):
            logits[row, place, labels[row, place]] = 9.0
        for row, place in ((0, 3), (1, 1), (1, 4)):
            logits[row, place, labels[row, place]] = -9.0
    losses, counts = answer_losses(logits, labels, kinds, answers)
    expected = F.cross_entropy(logits[[0, 0, 0, 1], [1, 2, 3, 4]], labels[[0, 0, 0, 1], [1, 2, 3, 4]])
    torch.testing.assert_close(losses[fact], expected)
    assert counts[fact].tolist() == [4, 2, 3, 1]
    assert counts[quote].tolist() == [2, 1, 1, 0]
    assert counts[0, 0] == 3


def test_low_rank_changes_start_silent_merge_exactly_and_are_put_back(tmp_path: Path) -> None:
    ids = torch.randint(3, 259, (1, 60), generator=torch.Generator().manual_seed(0))
    model = tiny_model().eval()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        add_lora(model, LoraConfig(rank=3))
        torch.testing.assert_close(model(ids, use_cache=False).logits, before)
        names = set(trained_tensors(model))
        assert all(is_new(name) or ".lora_" in name for name in names)
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in trained_tensors(model).items()
        }
        path = tmp_path / "trained.safetensors"
        save_trained(path, tensors, model.config, LoraConfig(rank=3))
        held = read_trained(path)
        assert (held.lora, held.options.num_lower_layers, held.options.chunk_size) == (
            LoraConfig(rank=3),
            1,
            15,
        )
        for name, tensor in held.tensors.items():
            torch.testing.assert_close(tensor.float(), tensors[name], rtol=1e-2, atol=1e-6)
        load_trained(model, tensors, "file")
        changed = model(ids, use_cache=False).logits
        assert (changed - before).abs().max() > 1e-3
        merge_lora(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, changed, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    with pytest.raises(DRTError, match="rank"):
        load_trained(tiny_model(), tensors, "file")


def test_a_run_starts_from_what_an_earlier_one_trained(tmp_path: Path, made: Path) -> None:
    first = run_training(load_config(write_config(tmp_path, made, eval_every=0)), ["drt"])
    folder = tmp_path / "second"
    folder.mkdir()
    file = str(first / "trained.safetensors")
    config = write_config(folder, made, eval_every=0, start_from=file, max_steps=1)
    second = run_training(load_config(config), ["drt"])
    assert read_log(folder / "run")[0]["loss"] < read_log(tmp_path / "run")[0]["loss"]
    assert read_trained(second / "trained.safetensors").tensors.keys() == read_trained(file).tensors.keys()


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trained.safetensors"
    path.write_bytes(content)
    with pytest.raises(DRTError, match=path.name):
        read_trained(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_from": None}, "init_from"),
        ({"curriculum": []}, "curriculum"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance_until": 0.0}, "guidance_until"),
        ({"lora": {"rank": -1}}, r"lora\.rank"),
        ({"tokens_per_step": 700}, "tokens_per_step"),
        (
            {"curriculum": [{"row_length": 512, "min_distance": 48, "mix": {"facst": 1}}]},
            r"curriculum\.0.*facst",
        ),
        (
            {"curriculum": [{"row_length": 512, "min_distance": 48, "mix": {"row_length": 9}}]},
            r"mix\.row_length",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, made: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DRTError, match=named):
        run_training(load_config(write_config(tmp_path, made, **changes)), ["drt"])
