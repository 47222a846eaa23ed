"""When the next stage begins, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from drt.train.curriculum import Curriculum, RunningTotals
from drt.train.loss import TOTALS, needle_means

STAGES: list[dict[str, Any]] = [
    {"chunks": 4, "threshold": 0.5},
    {"chunks": 8, "threshold": 0.9, "max_steps": 20},
    {"chunks": 16},
]


def _log(curriculum: Curriculum, step: int, accuracy: float) -> int:
    curriculum.on_log(None, TrainerState(global_step=step), TrainerControl(), {"answer_accuracy": accuracy})
    return curriculum.stage


def test_stages_follow_accuracy_and_step_limits() -> None:
    curriculum = Curriculum(STAGES)
    assert _log(curriculum, 10, 0.49) == 0
    assert _log(curriculum, 500, 0.2) == 0  # no limit of steps in this stage
    assert _log(curriculum, 510, 0.5) == 1
    assert curriculum.current.chunks == 8
    assert _log(curriculum, 520, 0.89) == 1
    assert _log(curriculum, 530, 0.0) == 2  # 20 steps in the stage
    assert _log(curriculum, 540, 1.0) == 2  # the last stage stays


def test_logs_without_accuracy_decide_nothing() -> None:
    curriculum = Curriculum(STAGES)
    curriculum.on_log(None, TrainerState(global_step=10), TrainerControl(), {"eval_score": 1.0})
    assert curriculum.stage == 0


def test_curriculum_survives_a_checkpoint() -> None:
    curriculum = Curriculum(STAGES)
    _log(curriculum, 10, 0.6)
    restored = Curriculum.from_state(json.loads(json.dumps(curriculum.state())))
    assert (restored.stage, restored.first_step, restored.stages) == (1, 10, curriculum.stages)


def _totals(**values: float) -> torch.Tensor:
    return torch.tensor([values.get(name, 0.0) for name in TOTALS], dtype=torch.float64)


FIRST = _totals(steps=1, loss=3.1, answer_loss=3, answer_tokens=10, answer_tokens_right=1, answers=2)
SECOND = _totals(
    steps=1,
    loss=2.3,
    answer_loss=2,
    answer_tokens=30,
    answer_tokens_right=19,
    answers=6,
    answers_right=4,
    chains=2,
)


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return values


def test_means_weigh_steps_and_tokens() -> None:
    totals = RunningTotals(TOTALS)
    totals.add(FIRST, 100)
    totals.add(SECOND, 100)
    sums, tokens_per_second = totals.take(alone)
    means = needle_means(sums)
    assert means["loss"] == pytest.approx(2.7)
    assert means["answer_loss"] == pytest.approx(2.5)
    assert means["answer_accuracy"] == pytest.approx(0.5)
    assert means["exact_match"] == pytest.approx(0.5)
    assert means["chain_exact_match"] == 0
    assert tokens_per_second > 0
    totals.add(FIRST, 100)
    means = needle_means(totals.take(alone)[0])
    assert means["loss"] == pytest.approx(3.1)
    assert "chain_exact_match" not in means  # no chain was asked


def test_partial_sums_survive_a_checkpoint() -> None:
    totals = RunningTotals(TOTALS)
    totals.seconds = 50.0
    totals.add(FIRST, 100)
    restored = RunningTotals.from_state(json.loads(json.dumps(totals.state())))
    restored.add(SECOND, 100)
    totals.add(SECOND, 100)
    assert totals.take(alone)[0] == restored.take(alone)[0]
    assert restored.elapsed() >= 50


def test_sums_of_several_processes_are_kept_by_one() -> None:
    processes = [RunningTotals(["steps", "loss"]) for _ in range(2)]
    both = torch.tensor([2.0, 5.0], dtype=torch.float64)
    for totals, loss in zip(processes, (2.0, 3.0), strict=True):
        totals.add(torch.tensor([1.0, loss], dtype=torch.float64), 10)
    for totals, keep in zip(processes, (True, False), strict=True):
        totals.merge(lambda _: both, keep)
    assert processes[0].state()["attributes"]["values"] == [2.0, 5.0]
    assert processes[1].state()["attributes"]["values"] == [0.0, 0.0]
    restored = RunningTotals.from_state(processes[0].state())
    restored.on_train_begin(None, TrainerState(is_world_process_zero=False), TrainerControl())
    assert restored.values == [0.0, 0.0]
