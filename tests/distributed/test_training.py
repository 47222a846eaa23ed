"""Two processes on the CPU train what one does, and what FSDP2 saved is an ordinary model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import drt.models  # noqa: F401 (registers the models with the Auto classes)
from drt.data.corpus_writer import ShardWriter, write_manifest
from drt.data.tokenizer import describe_tokenizer, load_tokenizer, save_tokenizer
from drt.train.logs import read_metrics

pytestmark = pytest.mark.slow

RUN = {
    "task": "language_model",
    "model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_lower_layers": 1,
        "num_upper_layers": 2,
        "num_groups": 2,
        "num_encoder_layers": 1,
        "chunk_size": 15,
        "retrieval_top_k": 2,
        "sliding_window": 16,
    },
    "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
    "tokens_per_step": 256,
    "rows_per_pass": 1,
    "max_steps": 4,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes that repeat, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    shards = {}
    for number, split in enumerate(("train", "validation")):
        writer = ShardWriter(folder, split, "uint16")
        tokens = np.tile(np.random.default_rng(number).integers(3, 259, 50), 60)
        writer.add(split, tokens, len(tokens))
        shards[split] = [writer.close()]
    tokenizer = load_tokenizer("bytes")
    save_tokenizer(tokenizer, folder / "tokenizer")
    write_manifest(folder, "uint16", describe_tokenizer(tokenizer, "bytes"), shards, [])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run by one process, by two (DDP), and by two that share the model (FSDP2)."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launcher, sharding in (
        ("one", [], "none"),
        ("ddp", torchrun, "none"),
        ("fsdp", torchrun, "fsdp"),
    ):
        data = {"corpus": str(corpus), "sequence_length": 64, "validation_sequences": 4}
        values = {**RUN, "data": data, "sharding": sharding, "output_dir": str(folder / name)}
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(values))
        finished = subprocess.run(
            [sys.executable, *launcher, "-m", "drt.train", str(config)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
    return {name: folder / name for name in ("one", "ddp", "fsdp")}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(runs: dict[str, Path], name: str) -> None:
    one, two = (read_metrics(runs[run] / "metrics.jsonl") for run in ("one", name))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4, 4]
    for expected, got in zip(one, two, strict=True):
        for key in {"loss", "grad_norm", "learning_rate", "eval_loss"} & set(expected):
            assert got[key] == pytest.approx(expected[key], rel=1e-5)
    weights, others = (load_file(runs[run] / "final" / "model.safetensors") for run in ("one", name))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-4)


def test_what_fsdp_saved_is_an_ordinary_model(runs: dict[str, Path], corpus: Path) -> None:
    ids = torch.arange(3, 131)[None]
    logits = []
    for folder in (runs["one"] / "final", runs["fsdp"] / "final", runs["fsdp"] / "checkpoint-4"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(logits[2], logits[1])
