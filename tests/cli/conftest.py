"""A tiny checkpoint that knows nothing, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer
from typer.testing import CliRunner, Result

from drt.cli.app import app
from drt.models.drt import DRTConfig, DRTForCausalLM

Drt = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    torch.manual_seed(0)
    config = DRTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_lower_layers=1,
        num_upper_layers=2,
        num_groups=2,
        num_encoder_layers=1,
        num_attention_heads=2,
        chunk_size=15,
        retrieval_top_k=2,
        sliding_window=24,
        eos_token_id=None,
        initializer_range=0.3,  # logits that differ enough to choose by
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    DRTForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture
def drt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drt:
    """Runs `drt ARGUMENTS` in an empty folder; `input` is its stdin."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return run


@pytest.fixture
def refuses(drt: Drt) -> Callable[..., str]:
    """Runs `drt ARGUMENTS`, which must end with one line on stderr and exit code 2; returns the line."""

    def run(*arguments: object, input: str | bytes | None = None) -> str:
        result = drt(*arguments, input=input)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("error: ").strip()

    return run


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of 1,000 bytes, some of them in characters of several."""
    path = tmp_path / "book.txt"
    words = (f"word {number} of été, " for number in range(100))
    path.write_bytes("".join(words).encode()[:1000].decode(errors="ignore").encode())
    return path


@pytest.fixture
def build(drt: Drt, checkpoint: Path) -> Callable[..., Result]:
    """Runs `drt memory build ARGUMENTS` with the tiny checkpoint; must succeed."""

    def run(*arguments: object) -> Result:
        result = drt("memory", "build", "--checkpoint", checkpoint, "--device", "cpu", *arguments)
        assert result.exit_code == 0, result.output
        return result

    return run
