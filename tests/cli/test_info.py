"""`drt info`: what it shows, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
Run = Callable[..., Any]


def test_a_language_model(drt: Run) -> None:
    result = drt("info", CONFIGS / "lm-tiny.yaml", "--set", "model.vocab_size=8192")
    assert result.exit_code == 0, result.output
    for shown in ("2,919,682", "FLOPs in all", "GiB a process", "8 x 2,048"):
        assert shown in result.stdout


def test_groups_of_unequal_size(drt: Run) -> None:
    def shown(layers: str) -> str:
        result = drt("info", CONFIGS / "needle-tiny.yaml", "--set", f"model.num_upper_layers={layers}")
        assert result.exit_code == 0, result.output
        return result.stdout

    assert shown("[1, 2]") == shown("[2, 1]") != shown("[1, 3]")
    assert shown("[2, 2]") == shown("4")


def test_needles(drt: Run) -> None:
    result = drt("info", CONFIGS / "needle-tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "64 x 31" not in result.stdout
    assert "2 x 1,984" in result.stdout


def test_a_missing_corpus_is_named(refuses: Run) -> None:
    assert "data/corpora/books is no corpus" in refuses("info", CONFIGS / "lm-tiny.yaml")
