"""`drt eval perplexity`, `drt eval runs` and `drt report` from the outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drt.eval.results import (
    AnswerRecord,
    EvaluationRecord,
    PerplexityRecord,
    TrainingRecord,
    read_records,
)

from .conftest import Drt

TRAINING = {
    "seed": 0,
    "steps": 5,
    "tokens": 500,
    "parameters": 4242,
    "wall_seconds": 3.0,
    "machine": {"device": "cpu"},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 12)
    return path


@pytest.fixture
def runs(tmp_path: Path, checkpoint: Path) -> Path:
    """Two finished runs, the seeds of one model, and one that is not finished."""
    for name in ("drt-s0", "drt-s1"):
        shutil.copytree(checkpoint, tmp_path / "runs" / name / "final")
        (tmp_path / "runs" / name / "final" / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "runs" / "other").mkdir()
    return tmp_path / "runs"


def test_perplexity_of_one_model(drt: Drt, checkpoint: Path, text: Path) -> None:
    result = drt(
        "eval",
        "perplexity",
        "--checkpoint",
        checkpoint,
        "--data",
        text,
        "--lengths",
        "100,200,300,400,500,600",
    )
    assert result.exit_code == 0, result.output
    (record,) = read_records("perplexity.jsonl", PerplexityRecord)
    assert (record.document, record.length, record.checkpoint) == ("book.txt", 636, str(checkpoint))
    assert record.positions == [100, 200, 256, 300, 400, 500, 512, 600, 1024]
    assert "Language modelling: book.txt" in result.output
    (heads,) = [line for line in result.output.splitlines() if "0-100" in line]
    assert heads.split()[-2:] == ["500-600", "600-"], "all columns, however narrow the terminal"


def test_two_models_are_compared(drt: Drt, runs: Path, text: Path) -> None:
    shutil.copytree(runs / "drt-s0", runs / "window")
    models = [option for name in ("drt-s0", "window") for option in ("--checkpoint", runs / name / "final")]
    result = drt("eval", "perplexity", *models, "--data", text, "--longest", "200", "--reference", "window")
    assert result.exit_code == 0, result.output
    assert "minus those of window" in result.output
    assert "+0.0000 to +0.0000" in result.output
    records = read_records("perplexity.jsonl", EvaluationRecord)
    assert [type(record) for record in records] == [TrainingRecord, PerplexityRecord] * 2
    assert {record.length for record in records if isinstance(record, PerplexityRecord)} == {200}


def test_runs_are_read_once_and_reported(drt: Drt, runs: Path, text: Path) -> None:
    command = ("eval", "runs", runs, "--data", text, "-o", "out", "--longest", "300")
    result = drt(*command, "--only", "*-s0")
    assert result.exit_code == 0, result.output
    first = Path("out/drt-s0.jsonl").read_bytes()
    result = drt(*command)
    assert result.exit_code == 0, result.output
    assert "kept, not read again: drt-s0" in result.stderr
    assert Path("out/drt-s0.jsonl").read_bytes() == first
    assert [r.checkpoint for r in read_records("out/drt-s1.jsonl", EvaluationRecord)] == ["drt-s1"] * 2
    page = Path("out/report.md").read_text()
    assert "| drt | 2 | 1 |" in page
    assert "4,242" in page
    assert not list(Path("out").glob("*.tmp"))


def test_a_finished_run_is_kept_when_the_next_one_fails(drt: Drt, runs: Path, text: Path) -> None:
    (runs / "drt-s1" / "final" / "config.json").write_text("{")
    result = drt("eval", "runs", runs, "--data", text, "-o", "out", "--longest", "300")
    assert result.exit_code != 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["drt-s0.jsonl", "settings.json"]


def test_records_of_other_settings_are_not_taken(
    drt: Drt, runs: Path, text: Path, refuses: Callable[..., str]
) -> None:
    command = ("eval", "runs", runs, "--data", text, "-o", "out")
    assert drt(*command, "--longest", "300").exit_code == 0
    assert "longest 300 there, 200 here" in refuses(*command, "--longest", "200")
    assert drt(*command, "--longest", "300", "--batch-size", "2").exit_code == 0
    assert "were made without 100" in refuses("report", "out", "--lengths", "100", "-o", "page")


def test_report_of_files_and_folders(drt: Drt, runs: Path, text: Path, checkpoint: Path) -> None:
    drt("eval", "runs", runs, "--data", text, "-o", "out", "--longest", "100")
    drt("eval", "needle", "--checkpoint", checkpoint, "--length", "256", "--samples", "2")
    result = drt("report", "out", "needle.jsonl", "-o", "page")
    assert result.exit_code == 0, result.output
    assert result.output.split() == ["page/report.md", "page/report.html"]
    page = Path("page/report.md").read_text()
    assert "## Language modelling: book.txt" in page
    assert "## Needles found, %: single" in page


def test_mistakes_are_one_line(
    refuses: Callable[..., str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    assert "no such file" in refuses("eval", "perplexity", "--checkpoint", checkpoint, "--data", "none.txt")
    model = ("eval", "perplexity", "--checkpoint", checkpoint, "--data", text)
    assert "--lengths: expected a length such as" in refuses(*model, "--lengths", "1Q")
    assert "--segment-size: expected a length such as" in refuses(*model, "--segment-size", "1Q")
    assert "--longest: expected a length such as" in refuses(*model, "--longest", "1Q")
    assert "--shortest: expected a length such as" in refuses(*model, "--shortest", "1Q")
    assert "--lengths: expected a length such as" in refuses("report", "none", "--lengths", "1Q")
    ruler = ("eval", "ruler", "--checkpoint", checkpoint)
    assert "--length: expected a length such as" in refuses(*ruler, "--length", "1Q")
    assert "at least 1048576 tokens, got none" in refuses(*model, "--shortest", "1M")
    assert f"--json {tmp_path}: expected a regular file" in refuses(*model, "--json", tmp_path)
    assert "expected a file apart from what is read, got one of it" in refuses(*model, "--json", text)
    answers = ("eval", "summarization", "--checkpoint", checkpoint, "--data", text, "--json", text)
    assert "expected a file apart from what is read, got one of it" in refuses(*answers)
    Path("perplexity.jsonl").write_text("records of a model")
    assert "no checkpoint folder" in refuses("eval", "perplexity", "--checkpoint", "none", "--data", text)
    assert Path("perplexity.jsonl").read_text() == "records of a model"
    assert "no such folder" in refuses("eval", "runs", "none", "--data", text, "-o", "out")
    assert "none.jsonl: cannot be read" in refuses("report", "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert "expected a folder with files of records" in refuses("report", tmp_path / "empty")


def test_summaries_are_scored(drt: Drt, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "news.jsonl").write_text('{"article": "a long story", "highlights": "a story"}\n' * 3)
    fields = ("--document-field", "article", "--summary-field", "highlights")
    data = ("--checkpoint", checkpoint, "--data", tmp_path / "news.jsonl", "--max-new-tokens", "5")
    result = drt("eval", "summarization", *data, *fields, "--samples", "2")
    assert result.exit_code == 0, result.output
    records = read_records("summarization.jsonl", AnswerRecord)
    assert [record.expected for record in records] == [["a story"]] * 2
    assert "rougeLsum, %" in result.output


def test_ruler_reaches_the_evaluation(drt: Drt, checkpoint: Path, refuses: Callable[..., str]) -> None:
    pytest.importorskip("lm_eval")
    result = drt(
        "eval", "ruler", "--checkpoint", checkpoint, "--task", "ruler_vt", "--length", "3K", "--samples", "1"
    )
    assert result.exit_code == 0, result.output
    assert [record.length for record in read_records("ruler.jsonl", AnswerRecord)] == [3072]
    assert "expected tasks of" in refuses("eval", "ruler", "--checkpoint", checkpoint, "--task", "essay")
