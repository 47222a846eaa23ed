"""Training runs in a folder: the finished ones, and what is known of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drt.errors import DRTError
from drt.eval.runs import find_runs, training_record
from drt.models.loading import shipped_checkpoint


def test_finished_runs_by_name(tmp_path: Path) -> None:
    for name in ("books-b/final", "books-a/final", "linux/final", "books-c/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "books-note").write_text("")
    assert list(find_runs(tmp_path, "books-*").items()) == [
        ("books-a", tmp_path / "books-a" / "final"),
        ("books-b", tmp_path / "books-b" / "final"),
    ]
    assert len(find_runs(tmp_path)) == 3
    with pytest.raises(DRTError, match=r"expected finished runs .* got 1 folders .* none finished"):
        find_runs(tmp_path, "books-c")
    with pytest.raises(DRTError, match="no such folder"):
        find_runs(tmp_path / "none")


def test_the_record_of_a_training() -> None:
    record = training_record(shipped_checkpoint(), "tiny")
    assert record is not None
    assert (record.task, record.checkpoint, record.architecture) == ("training", "tiny", "drt")
    assert record.parameters > 10**6
    assert record.seconds > 0
    assert record.dtype == "float32"


def test_damaged_records_are_named(tmp_path: Path) -> None:
    assert training_record(tmp_path, "x") is None
    (tmp_path / "config.json").write_text('{"model_type": "drt"}')
    for text in ("{", "[]", json.dumps({"seed": 1})):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(DRTError, match=r"training\.json: expected"):
            training_record(tmp_path, "x")
