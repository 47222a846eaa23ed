"""`drt eval lm-eval`: the shipped model on two small tasks of our own, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import Result

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from drt.eval import lm_eval as evaluation
from drt.eval.results import HarnessRecord, read_records
from drt.models.loading import shipped_checkpoint
from drt.report.page import build_page, to_markdown


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks on the same four needles: one generates, one chooses. There are no others."""
    monkeypatch.setattr(evaluation, "TaskManager", partial(TaskManager, include_defaults=False))
    filling = "The quick brown fox jumps over the lazy dog. "
    with (tmp_path / "needles.jsonl").open("w") as file:
        for number, (name, answer) in enumerate([("qx", 48213), ("ab", 77031), ("mz", 10469), ("wk", 95120)]):
            text = f"{filling * (5 + number)}|{name}={answer}| {filling * 12}|{name}?"
            choices = [str(answer + 1), str(answer), str(answer + 10)]
            file.write(json.dumps({"text": text, "answer": str(answer), "choices": choices}) + "\n")
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "needles.jsonl"}, cache_dir: {tmp_path / "cache"}}}
test_split: train
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
"""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "says.yaml").write_text(
        f"""task: needle_says
{common}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["|"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "chooses.yaml").write_text(
        f"""task: needle_chooses
{common}
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


def test_the_shipped_model_chooses_what_it_says(drt: Callable[..., Result], tasks: Path) -> None:
    names = ("needle_says", "needle_chooses")
    options = ("--include-path", tasks, "--batch-size", 2, "--json", "found.jsonl")
    result = drt("eval", "lm-eval", *names, "--checkpoint", shipped_checkpoint(), *options)
    assert result.exit_code == 0, result.output
    records = read_records("found.jsonl", HarnessRecord)
    assert [(r.task, r.measure, r.value, r.questions, r.shots) for r in records] == [
        ("needle_says", "exact_match", 1, 4, 0),
        ("needle_chooses", "acc", 1, 4, 0),
    ]
    for shown in (result.output, to_markdown(build_page(records))):
        assert all(name in shown for name in ("needle", "exact", "acc", "standard error"))


def test_the_first_questions_of_a_task(drt: Callable[..., Result], checkpoint: Path, tasks: Path) -> None:
    options = ("--include-path", tasks, "--limit", 2, "--max-length", "200")
    result = drt("eval", "lm-eval", "needle_chooses", "--checkpoint", checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert [record.questions for record in read_records("lm-eval.jsonl", HarnessRecord)] == [2]


def test_what_it_does_not_know_is_named(
    refuses: Callable[..., str], checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    def refused(task: str, folder: Path) -> str:
        return refuses("eval", "lm-eval", task, "--checkpoint", checkpoint, "--include-path", folder)

    assert "nothing_such" in refused("nothing_such", tasks)
    assert "missing: expected a folder" in refused("needle_says", tmp_path / "missing")
    (tmp_path / "needles.jsonl").unlink()
    assert "lm-eval, needle_says: " in refused("needle_says", tasks)
