"""What a run takes, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from drt.models.flops import attention_flops, training_flops
from drt.models.window import WindowConfig, WindowForCausalLM
from drt.train.config import load_config
from drt.train.estimate import estimate_run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_operations_of_a_window_model_by_hand() -> None:
    config = WindowConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        sliding_window=4,
    )
    # Position t of ten sees min(t + 1, 4) keys: 1 + 2 + 3 + 7 x 4 = 34; two products of 2 x 8 operations a key.
    assert attention_flops(config, 10) == pytest.approx(3 * 2 * 2 * 8 * 3.4)
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 50
    assert training_flops(WindowForCausalLM(config), 10) == pytest.approx(
        3 * (2 * matrices + 3 * 2 * 2 * 8 * 3.4)
    )


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


@pytest.mark.parametrize("name", ["25m", "128m", "350m"])
def test_large_configurations_are_read(name: str) -> None:
    run = load_config(CONFIGS / f"{name}.yaml")
    assert run.passes_per_step(8) >= 1
    assert run.optimizer.warmup_steps == run.max_steps // 50
