"""Language models: what a step is made of, whole runs, and corpora that cannot be trained on."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from drt.data.corpus import open_corpus
from drt.data.haystack import sample_haystack
from drt.data.sampling import WindowSampler
from drt.data.tokenizer import save_tokenizer, train_tokenizer
from drt.errors import DRTError
from drt.models.cost import training_flops
from drt.train.checkpoints import find_checkpoints
from drt.train.config import CorpusConfig, LanguageModelConfig, OptimizerConfig, load_config
from drt.train.language_model import LanguageModelTrainer
from drt.train.logs import read_metrics
from drt.train.models import build_model
from drt.train.run import run_training

MODEL = {
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
    "gumbel_noise": True,
}
MakeConfig = Callable[..., LanguageModelConfig]


@pytest.fixture
def make_config(tmp_path: Path, corpus: Path) -> MakeConfig:
    base = LanguageModelConfig(
        task="language_model",
        output_dir=str(tmp_path / "run"),
        model=MODEL,
        data=CorpusConfig(corpus=str(corpus), sequence_length=64, validation_sequences=6),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        tokens_per_step=256,
        rows_per_pass=2,
        max_steps=8,
        log_every=2,
        eval_every=4,
        save_every=2,
        device="cpu",
    )

    def make(name: str = "run", **changes: Any) -> LanguageModelConfig:
        return dataclasses.replace(base, output_dir=str(tmp_path / name), **changes)

    return make


class Run:
    """Runs a configuration, collecting the loss of every pass."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rows: list[np.ndarray] = []
        self.before_pass: dict[int, Callable[[], None]] = {}

    def __call__(self, config: LanguageModelConfig) -> Path:
        return run_training(config, ["drt", "train", "run.yaml"], Console(file=io.StringIO()))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run()
    compute_loss = LanguageModelTrainer.compute_loss

    def record(self: LanguageModelTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        run.before_pass.get(len(run.losses), lambda: None)()
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        run.losses.append(loss.item())
        run.rows.append(inputs["input_ids"].numpy().copy())
        return loss

    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", record)
    return run


def test_a_run_from_start_to_export(run: Run, make_config: MakeConfig, corpus: Path) -> None:
    config = make_config()
    final = run(config)
    sampler = WindowSampler(open_corpus(corpus, "train"), 64, config.seed, inside_documents=False)
    assert np.array_equal(np.concatenate(run.rows), np.stack([sampler[number] for number in range(8 * 4)]))

    metrics = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    trained = [line for line in metrics if "loss" in line]
    validated = [line for line in metrics if "eval_score" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8]
    assert [line["step"] for line in validated] == [4, 8]
    for index, line in enumerate(trained):
        assert line["loss"] == pytest.approx(sum(run.losses[4 * index : 4 * index + 4]) / 4)
        assert {"learning_rate", "grad_norm", "tokens_per_second", "seconds"} <= set(line)
    assert trained[-1]["learning_rate"] == pytest.approx(1e-3, rel=1e-12)
    assert trained[-1]["loss"] < trained[0]["loss"]

    best = max(validated, key=lambda line: line["eval_score"])
    record = json.loads((final / "training.json").read_text())
    assert record["exported_step"] == best["step"]
    assert record["tokens"] == 8 * 256
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    assert (model.config.vocab_size, model.config.gumbel_noise) == (300, True)
    assert len(AutoTokenizer.from_pretrained(final)) == 300
    held_out = open_corpus(corpus, "validation")
    rows = held_out.num_tokens // 64
    starts = [index * rows // 6 * 64 for index in range(6)]
    ids = torch.stack(
        [torch.from_numpy(held_out.tokens(start, start + 64).astype(np.int64)) for start in starts]
    )
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert best["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert best["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_accumulated_passes_make_the_same_step(run: Run, make_config: MakeConfig) -> None:
    model = {**MODEL, "gumbel_noise": False}
    one = run(make_config("one", model=model, rows_per_pass=None, eval_every=0, max_steps=3, log_every=1))
    two = run(make_config("two", model=model, rows_per_pass=1, eval_every=0, max_steps=3, log_every=1))
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("killed_at", [5, 8])
def test_a_stopped_run_goes_on_bit_for_bit(run: Run, make_config: MakeConfig, killed_at: int) -> None:
    run(make_config("whole", max_steps=5))
    whole = run.losses
    run.losses = []

    def stop() -> None:
        raise KeyboardInterrupt

    run.before_pass[killed_at] = stop
    with pytest.raises(KeyboardInterrupt):
        run(make_config("killed", max_steps=5))
    run.before_pass.clear()
    run.losses = []
    run(make_config("killed", max_steps=5))
    first = killed_at // 4 * 4  # two passes a step, a checkpoint every two steps
    assert run.losses == whole[first:]


def test_memory_is_saved_without_changing_the_losses(run: Run, make_config: MakeConfig) -> None:
    run(make_config("plain", max_steps=3, eval_every=0))
    plain, run.losses = run.losses, []
    run(make_config("checkpointed", max_steps=3, eval_every=0, gradient_checkpointing=True))
    assert run.losses == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("model_type", ["window", "full_attention", "landmark", "block_recurrent"])
def test_baselines_train_by_name_and_tell_what_of_the_peak_they_reach(
    run: Run, make_config: MakeConfig, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    monkeypatch.setattr("drt.train.language_model.peak_flops", lambda device: 1e9)
    config = make_config(model={"model_type": model_type, **fields}, max_steps=1, log_every=1)
    model = AutoModelForCausalLM.from_pretrained(run(config))
    assert model.config.model_type == model_type
    logged, _ = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert logged["mfu"] == pytest.approx(
        logged["tokens_per_second"] * training_flops(model.config, 64) / 1e9
    )


def test_models_must_be_known(make_config: MakeConfig) -> None:
    with pytest.raises(DRTError, match=r"model\.model_type: expected drt or a baseline's, got 'dart'"):
        build_model(make_config(model={"model_type": "dart"}))
    with pytest.raises(
        DRTError, match=r"unknown key model\.chunk_size; expected a field of WindowConfig: .*hidden_size"
    ):
        build_model(make_config(model={"model_type": "window", "chunk_size": 3}))


def test_a_full_disk_leaves_the_checkpoint_before(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config("whole", max_steps=4))
    whole, run.losses = run.losses, []
    config = make_config("full", max_steps=4)
    save = torch.save

    def full_at_four(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(value, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_four)
        with pytest.raises(
            DRTError, match=r"checkpoint-4 could not be written, .*No space left.*checkpoint-2 is whole"
        ):
            run(config)
    kept, incomplete = find_checkpoints(Path(config.output_dir))
    assert [folder.name for folder in kept] == ["checkpoint-2"]
    assert incomplete == []
    run.losses = []
    run(config)
    assert run.losses == whole[4:]


def test_damaged_corpora_are_refused(run: Run, make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    config = make_config(data=CorpusConfig(corpus=str(copy), sequence_length=64))
    shard = copy / "train-00000.tokens.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DRTError, match=r"train-00000\.tokens\.bin is damaged"):
        run(config)
    save_tokenizer(train_tokenizer([sample_haystack().text.decode()[:9000]], 300), copy / "tokenizer")
    with pytest.raises(DRTError, match="is not the tokenizer that the corpus was made with"):
        run(config)
    (copy / "manifest.json").unlink()
    with pytest.raises(DRTError, match="is no corpus"):
        run(config)


def test_corpora_shorter_than_a_row_are_refused(run: Run, make_config: MakeConfig, corpus: Path) -> None:
    longest = int(open_corpus(corpus, "train").document_lengths.max())
    length = longest + 1
    data = CorpusConfig(corpus=str(corpus), sequence_length=length, inside_documents=True)
    with pytest.raises(DRTError, match=rf"shorter than one sequence: expected {length} tokens, .* {longest}"):
        run(make_config(data=data, tokens_per_step=length, rows_per_pass=1))
    held_out = open_corpus(corpus, "validation").num_tokens
    data = CorpusConfig(corpus=str(corpus), sequence_length=held_out + 1)
    with pytest.raises(DRTError, match=rf"validation: shorter than one sequence: expected {held_out + 1}"):
        run(make_config("other", data=data, tokens_per_step=held_out + 1, rows_per_pass=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_step": 100}, "expected a multiple of data.sequence_length = 64, got 100"),
        ({"rows_per_pass": 0}, "rows_per_pass: expected at least 1, got 0"),
        ({"sharding": "zero"}, "expected none or fsdp, got 'zero'"),
        ({"data": {"corpus": "x", "sequence_length": 1}}, "sequence_length: expected at least 2, got 1"),
        (
            {"task": "poetry"},
            "task: expected needles, language_model, summarization, retrieval, got 'poetry'",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    values = {
        "task": "language_model",
        "output_dir": "x",
        "model": {},
        "data": {"corpus": "x", "sequence_length": 64},
        "tokens_per_step": 128,
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    load_config(path)
    path.write_text(json.dumps({**values, **changes}))
    with pytest.raises(DRTError, match=message):
        load_config(path)


def test_rows_are_shared_evenly_or_not_at_all(make_config: MakeConfig) -> None:
    config = make_config(rows_per_pass=2)
    assert [config.passes_per_step(size) for size in (1, 2)] == [2, 1]
    with pytest.raises(DRTError, match="as many rows for each of 3 processes, got 4 rows of 64 tokens"):
        config.passes_per_step(3)
    with pytest.raises(DRTError, match="expected a divisor of the 1 rows of a process per step, got 2"):
        config.passes_per_step(4)
