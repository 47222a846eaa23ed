"""Fine-tuning on summaries: what a step is made of, whole runs, and data that cannot be trained on."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from drt.data.summaries import SummaryPair, summary_batch
from drt.data.tokens import TextCodec
from drt.errors import DRTError
from drt.eval.summarization import evaluate_summaries
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.train.config import OptimizerConfig, SummariesConfig, SummarizationConfig, load_config
from drt.train.logs import read_metrics
from drt.train.run import run_training
from drt.train.summarization import SummarizationTrainer

WORDS = ["river", "stone", "a dog", "the sea", "north", "her letter", "winter", "two ships"]
PAIRS = [
    SummaryPair(
        f"They saw {first} and then {second}, it was {first} again.", f"{first}, {second}" * (1 + number % 2)
    )
    for number, (first, second) in enumerate((a, b) for a in WORDS for b in WORDS[:3])
]
MakeConfig = Callable[..., SummarizationConfig]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint without an end token of its own: bytes, chunks of 15."""
    torch.manual_seed(5)
    config = DRTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_lower_layers=1,
        num_upper_layers=2,
        num_groups=2,
        num_encoder_layers=1,
        chunk_size=15,
        retrieval_top_k=2,
        sliding_window=16,
        gumbel_noise=True,
        eos_token_id=None,
    )
    DRTForCausalLM(config).save_pretrained(tmp_path / "start")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def make_config(tmp_path: Path, start: Path) -> MakeConfig:
    for name, pairs in (("train", PAIRS[:18]), ("validation", PAIRS[18:])):
        lines = [json.dumps({"article": pair.document, "highlights": pair.summary}) for pair in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    base = SummarizationConfig(
        task="summarization",
        output_dir="",
        model={},
        init_from=str(start),
        data=SummariesConfig(
            train=str(tmp_path / "train.jsonl"),
            validation=str(tmp_path / "validation.jsonl"),
            sequence_length=64,
            document_field="article",
            summary_field="highlights",
            validation_pairs=5,
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
        tokens_per_step=256,
        rows_per_pass=2,
        max_steps=5,
        log_every=1,
        eval_every=5,
        save_every=2,
        device="cpu",
    )

    def make(name: str = "run", **changes: Any) -> SummarizationConfig:
        return dataclasses.replace(base, output_dir=str(tmp_path / name), **changes)

    return make


def run(config: SummarizationConfig) -> Path:
    return run_training(config, ["drt", "train", "run.yaml"], Console(file=io.StringIO()))


def losses(config: SummarizationConfig) -> list[float]:
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@torch.no_grad()
def mean_loss(model: Any, pairs: list[SummaryPair]) -> float:
    """Of every token of every summary, each pair read alone."""
    total, count = 0.0, 0
    codec = TextCodec(ByT5Tokenizer(extra_ids=0))
    for pair in pairs:
        batch = summary_batch([pair], codec, longest=64, end=1)
        logits = model(batch["input_ids"], chunk_ends=batch["chunk_ends"], use_cache=False).logits[0, :-1]
        scored = batch["labels"][0, 1:]
        total += cross_entropy(logits, scored, reduction="sum").item()
        count += int((scored >= 0).sum())
    return total / count


def test_a_run_from_start_to_export(
    make_config: MakeConfig, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[str] = []
    compute_loss = SummarizationTrainer.compute_loss

    def record(self: SummarizationTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows.extend(
            bytes(int(token) - 3 for token in ids if token > 2).decode() for ids in inputs["input_ids"]
        )
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SummarizationTrainer, "compute_loss", record)
    config = make_config()
    final = run(config)
    assert len(rows) == 20
    assert sorted({row.split("\n\nSummary: ")[1] for row in rows[:18]}) == sorted(
        {p.summary for p in PAIRS[:18]}
    )
    assert len(set(rows[:18])) == 18, "every pair once before any comes again"

    metrics = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    (validated,) = [line for line in metrics if "eval_score" in line]
    found = losses(config)
    assert found[-1] < found[0]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(final).eval(),
        AutoTokenizer.from_pretrained(final),
    )
    assert validated["eval_loss"] == pytest.approx(mean_loss(model, PAIRS[18:23]), rel=1e-5)
    assert validated["eval_perplexity"] == pytest.approx(math.exp(validated["eval_loss"]))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 1
    (summary,) = evaluate_summaries(
        model, tokenizer, PAIRS[18:19], checkpoint="x", data="x", max_new_tokens=3
    )
    assert set(summary.scores) == {"rouge1", "rouge2", "rougeLsum"}


def test_every_token_of_a_step_weighs_the_same(make_config: MakeConfig, start: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "eval_every": 0, "model": {"gumbel_noise": False}}
    configs = [make_config(f"by {rows}", rows_per_pass=rows, **settings) for rows in (None, 1)]
    for config in configs:
        run(config)
    whole, single = map(losses, configs)
    assert whole == pytest.approx(
        single, rel=1e-5
    )  # the second is of weights that the first step has changed
    model = AutoModelForCausalLM.from_pretrained(start)
    trainer = SummarizationTrainer(configs[0], model, ByT5Tokenizer(extra_ids=0), [])
    first = [trainer.pair_at(place) for place in range(4)]
    assert whole[0] == pytest.approx(mean_loss(model.eval(), first), rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = make_config("whole", eval_every=0), make_config("killed", eval_every=0)
    run(whole)
    compute_loss = SummarizationTrainer.compute_loss

    def kill_in_the_fourth_step(self: SummarizationTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SummarizationTrainer, "compute_loss", kill_in_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    run(killed)
    assert losses(killed) == losses(whole)


def test_data_that_cannot_be_trained_on_is_named(
    make_config: MakeConfig, tmp_path: Path, start: Path
) -> None:
    def refused(**changes: Any) -> str:
        data = dataclasses.replace(make_config().data, **changes)
        with pytest.raises(DRTError) as error:
            run(make_config(f"refused {len(list(tmp_path.iterdir()))}", data=data))
        return str(error.value)

    assert "train.jsonl:1: expected a text in the field 'text'" in refused(document_field="text")
    assert "nothing.jsonl: cannot be read" in refused(train=str(tmp_path / "nothing.jsonl"))
    assert "nothing.jsonl: cannot be read" in refused(validation=str(tmp_path / "nothing.jsonl"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"article": "a", "highlights": "b" * 60}))
    assert (
        "long.jsonl, line 1: expected a summary of at most 51 tokens, for a row of data.sequence_length = 64; it has 60"
    ) in refused(train=str(tmp_path / "long.jsonl"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_letters())
    tokenizer.save_pretrained(start)
    (start / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "its tokenizer has no end token" in refused()


def _letters() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({"a": 0, "b": 1}, []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "init_from: expected the checkpoint to fine-tune, got nothing"),
        ({"tokens_per_step": 100}, "expected a multiple of data.sequence_length = 64, got 100"),
        (
            {"data": {"train": "x", "validation": "x", "sequence_length": 8}},
            "sequence_length: expected at least 16",
        ),
        ({"data": {"train": "x", "sequence_length": 64}}, "the key data.validation is missing"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    values = {
        "task": "summarization",
        "output_dir": "x",
        "model": {},
        "init_from": "x",
        "data": {"train": "x", "validation": "x", "sequence_length": 64},
        "tokens_per_step": 128,
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    assert isinstance(load_config(path), SummarizationConfig)
    path.write_text(json.dumps(values | changes))
    with pytest.raises(DRTError, match=message):
        load_config(path)


def test_the_configuration_that_ships_is_read() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "summarization.yaml")
    assert isinstance(config, SummarizationConfig)
    assert config.passes_per_step(1) == 4
