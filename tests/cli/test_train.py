"""`drt train`: mistakes in the YAML file or on the command line are one line. Training itself: tests/train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drt.train import run as training
from drt.train.config import TrainConfig

Run = Callable[..., Any]

CONFIG = """
output_dir: out
model: {hidden_size: 32, num_attention_heads: 2, chunk_size: 15}
data: {haystack: [a.txt], validation_haystack: [a.txt]}
curriculum: [{chunks: 8}]
device: cpu
"""


@pytest.fixture
def config(drt: Run) -> Path:
    """A configuration and its text, in the folder where `drt` runs."""
    Path("a.txt").write_text("some words of text " * 500)
    Path("run.yaml").write_text(CONFIG)
    return Path("run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead: 3", "unknown key sead; expected one of output_dir"),
        ("seed: three", "seed: expected a whole number, got 'three' (str)"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast' (str)"),
        ("device: tpu", "device: expected auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_a_wrong_key_or_type_is_one_line(refuses: Run, config: Path, text: str, message: str) -> None:
    lines = [line for line in CONFIG.splitlines() if not line.startswith(text.split(":")[0])]
    config.write_text("\n".join([*lines, text]))
    found = refuses("train", config)
    assert message in found
    assert str(config) in found
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr"),
        ("model.hidden_sise=64", "unknown key model.hidden_sise; expected a field of DRTConfig"),
        ("model.sink=maybe", "Field 'model.sink' expected bool, got str (value: 'maybe')"),
        (
            "model.num_attention_heads=3",
            "model.hidden_size must be model.num_attention_heads x model.head_dim",
        ),
        ("data.haystack=[nothing.txt]", "nothing.txt: no such file or folder"),
    ],
)
def test_a_wrong_override_is_one_line(refuses: Run, config: Path, override: str, message: str) -> None:
    assert message in refuses("train", config, "--set", override)


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "\x00"])
def test_a_file_that_is_no_configuration_is_named(drt: Run, config: Path, text: str) -> None:
    config.write_text(text)
    result = drt("train", config)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {config}")
    assert "Traceback" not in result.output


def test_a_missing_file_is_named(refuses: Run) -> None:
    assert "nothing.yaml: cannot be read" in refuses("train", "nothing.yaml")


def test_a_folder_that_cannot_be_written_is_named(refuses: Run, config: Path) -> None:
    assert "a.txt" in refuses("train", config, "--set", "output_dir=a.txt/below")
    assert "a.txt" in refuses("train", config, "--set", "output_dir=a.txt")


def test_the_run_gets_configuration_and_command(
    drt: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []

    def run_training(settings: TrainConfig, command: list[str], console: Any) -> Path:
        given.append(settings)
        assert command[0] == "drt"
        return Path("out/final")

    monkeypatch.setattr(training, "run_training", run_training)
    result = drt("train", config, "--set", "seed=5", "--set", "curriculum.0.chunks=9")
    assert result.exit_code == 0, result.output
    assert result.stderr.strip() == "the trained model is in out/final"
    assert (given[0].seed, given[0].curriculum[0].chunks) == (5, 9)
