"""The checkpoint that ships: made as its configuration file says, and able to find what is hidden."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from drt.data.needles import load_haystack
from drt.eval.needle import NeedlePlan, evaluate_needles
from drt.models.loading import load_model, shipped_checkpoint
from drt.train.config import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "needle-tiny.yaml"


def test_it_was_made_by_the_configuration_that_is_here(tmp_path: Path) -> None:
    record = json.loads((shipped_checkpoint() / "training.json").read_text(encoding="utf-8"))
    assert record["command"] == "drt train configs/needle-tiny.yaml"
    recorded = (
        tmp_path / "config.yaml"
    )  # read as a configuration, so that keys added since have their defaults
    recorded.write_text(yaml.safe_dump(record["config"]), encoding="utf-8")
    assert load_config(recorded) == load_config(CONFIG)
    assert record["steps"] == record["config"]["max_steps"]


def test_its_log_tells_of_every_interval() -> None:
    lines = (shipped_checkpoint() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = load_config(CONFIG)
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == list(range(config.log_every, config.max_steps + 1, config.log_every))


def test_it_finds_needles_in_text_it_has_never_seen() -> None:
    model, tokenizer = load_model(shipped_checkpoint())
    assert model.dtype == torch.float32
    plan = NeedlePlan(tasks=("single", "multikey"), lengths=(4096,), samples=4, seed=11)
    records = list(evaluate_needles(model, tokenizer, load_haystack(), plan, checkpoint="needle-tiny"))
    assert sum(record.correct for record in records) >= 7


def test_it_finds_nothing_when_retrieval_is_taken_away() -> None:
    model, tokenizer = load_model(shipped_checkpoint())
    for layer in model.model.upper_layers:
        torch.nn.init.zeros_(layer.grouped_cross_attention.o_proj.weight)
    plan = NeedlePlan(tasks=("single",), lengths=(4096,), samples=4, seed=11)
    records = list(evaluate_needles(model, tokenizer, load_haystack(), plan, checkpoint="needle-tiny"))
    assert not any(record.correct for record in records)
