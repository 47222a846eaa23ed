"""What a run takes, against counts by hand."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from drt.train.config import load_config
from drt.train.estimate import estimate_run, saved_bytes
from drt.train.models import build_model

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_tiny_language_model() -> None:
    run = load_config(CONFIGS / "lm-tiny.yaml", ["model.vocab_size=8192"])
    found = estimate_run(run)
    assert 2.5e6 < found.parameters < 3.5e6
    assert found.embedding_parameters == 8192 * 128
    assert 10e6 <= found.tokens <= 20e6
    assert found.total_flops == found.flops_per_token * found.tokens
    # Six operations a weight and token, plus attention.
    assert 6 * found.parameters < found.flops_per_token < 9 * found.parameters
    assert found.state_bytes == 16 * found.parameters
    assert (found.rows_per_pass, found.row_length) == (8, 2048)
    saved = estimate_run(
        load_config(CONFIGS / "lm-tiny.yaml", ["model.vocab_size=8192", "gradient_checkpointing=true"])
    )
    half = estimate_run(load_config(CONFIGS / "lm-tiny.yaml", ["model.vocab_size=8192", "dtype=bfloat16"]))
    assert saved.activation_bytes < found.activation_bytes / 3
    assert half.activation_bytes == pytest.approx(found.activation_bytes / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["lm-tiny", "baselines/window"])
def test_a_language_model_keeps_no_logits(name: str) -> None:
    small, large = (
        estimate_run(load_config(CONFIGS / f"{name}.yaml", [f"model.vocab_size={size}"]))
        for size in (512, 8192)
    )
    assert small.activation_bytes == large.activation_bytes


@pytest.mark.parametrize("name", ["25m", "128m", "350m"])
def test_large_configurations_are_read(name: str) -> None:
    run = load_config(CONFIGS / f"{name}.yaml")
    assert run.passes_per_step(8) >= 1
    assert run.optimizer.warmup_steps == run.max_steps // 50


BASELINES = [path.stem for path in sorted((CONFIGS / "baselines").glob("*.yaml"))]


@pytest.mark.parametrize("name", BASELINES)
def test_every_model_type_is_estimated(name: str) -> None:
    run = load_config(CONFIGS / "baselines" / f"{name}.yaml", ["model.vocab_size=8192"])
    found = estimate_run(run)
    assert 6 * found.parameters < found.flops_per_token < 12 * found.parameters
    if name != "drt-embedding":  # runs with its embedder only
        model = build_model(run)
        assert found.activation_bytes == round(saved_bytes(model, 256, labels=True) / 256 * 4096 * 4)
        assert found.parameters == model.num_parameters()


def test_a_large_model_is_never_made() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate_run(load_config(CONFIGS / "350m.yaml"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 330e6 < found.parameters < 360e6
    assert (after - before) * 1024 < found.parameters  # one byte of each would be more
