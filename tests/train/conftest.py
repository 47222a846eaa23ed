"""A run small enough to train in a test: real text, a two-group model, three short stages."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drt.data.haystack import sample_haystack
from drt.data.prepare import PrepareConfig, prepare_corpus
from drt.data.sources import Source
from drt.data.tokenizer import save_tokenizer, train_tokenizer
from drt.train.config import DataConfig, OptimizerConfig, StageConfig, TrainConfig, ValidationConfig
from drt.train.trainer import NeedleTrainer

sys.path.insert(0, str(Path(__file__).parent))  # for what the tests of runs share

from runs import Run

TINY_MODEL = {
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
}


def _write_text(path: Path, seed: int) -> str:
    """Words in no order: text enough to hide needles in."""
    words = ["chunk", "window", "reads", "the", "a", "memory", "of", "long", "texts", "and", "forgets"]
    drawn = np.random.default_rng(seed).choice(words, size=4000)
    path.write_text(" ".join(drawn) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A tiny run in `tmp_path / name`; keywords replace fields.

    The stages change after steps 3 and 6 by their step limits: nothing is learned in so few steps. The Gumbel noise
    of the last stage draws from PyTorch's own generator, so that a resumed run must restore its state too.
    """
    base = TrainConfig(
        output_dir=str(tmp_path / "run"),
        model=TINY_MODEL,
        data=DataConfig(
            haystack=[_write_text(tmp_path / "train.txt", 0)],
            validation_haystack=[_write_text(tmp_path / "validation.txt", 1)],
        ),
        curriculum=[
            StageConfig(chunks=5, threshold=1.0, max_steps=3),
            StageConfig(chunks=6, threshold=1.0, max_steps=3, chain_share=0.5),
            StageConfig(chunks=8, gumbel_noise=True),
        ],
        optimizer=OptimizerConfig(warmup_steps=2),
        validation=ValidationConfig(lengths=[256], samples=2, segment_size=100),
        tokens_per_step=240,
        max_steps=12,
        log_every=3,
        save_every=2,
        eval_every=4,
        threads=0,
        device="cpu",
    )

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        return dataclasses.replace(base, output_dir=str(tmp_path / name), **changes)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of English prose, in a BPE of 300 entries."""
    folder = tmp_path_factory.mktemp("corpus")
    text = sample_haystack().text.decode()
    pieces = [text[number * 3000 :][:3000] for number in range(40)]
    rows = "\n".join(json.dumps({"id": str(number), "text": piece}) for number, piece in enumerate(pieces))
    (folder / "rows.jsonl").write_text(rows)
    save_tokenizer(train_tokenizer(pieces, 300), folder / "bpe")
    config = PrepareConfig(
        sources=[Source(path=str(folder / "rows.jsonl"))],
        tokenizer=str(folder / "bpe"),
        validation_share=0.2,
        test_share=0.1,
    )
    prepare_corpus(config, folder / "corpus")
    return folder / "corpus"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run()
    compute_loss = NeedleTrainer.compute_loss

    def record(self: NeedleTrainer, model, inputs, *args, **kwargs):
        step = self.state.global_step
        run.before_step.get(step, lambda: None)()
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        run.losses[step] = loss.item()
        run.stages[step] = inputs["input_ids"].shape[1] // 15
        return loss

    monkeypatch.setattr(NeedleTrainer, "compute_loss", record)
    return run
