"""Mistakes that ended in tracebacks, hung, or were told without the name of the file or option."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def places(drt: Run) -> None:
    """Things that are no regular file, and files that hold something else, in the folder where `drt` runs."""
    os.mkfifo("pipe")
    Path("zero").symlink_to("/dev/zero")
    Path("dangling").symlink_to("nowhere")
    Path("folder").mkdir()
    Path("text").write_text("It was the best of times. " * 40)
    Path("object.json").write_text("{}")
    Path("broken.yaml").write_text("a: [")


@pytest.mark.parametrize("place", ["pipe", "zero", "dangling", "folder", "nowhere"])
@pytest.mark.parametrize(
    "command",
    [
        ("report",),
        ("train",),
        ("info",),
        ("eval", "summarization", "--checkpoint", "none", "--data"),
        ("convert", "none", "-o", "out", "--config"),
    ],
    ids=" ".join,
)
def test_what_is_no_file_is_named(refuses: Run, places: None, command: tuple[str, ...], place: str) -> None:
    message = refuses(*command, place)
    assert message.startswith(f"{place}: ")
    assert "[Errno" not in message


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("generate", "x", "--device", "mps"), ["--device", "mps"]),
        (("generate", "x", "--device", "meta"), ["--device", "meta"]),
        (("eval", "runs", ".", "--data", "text", "-o", "out", "--only", ""), ["finished runs"]),
        (("eval", "runs", ".", "--data", "text", "-o", "out", "--only", "/etc"), ["/etc"]),
        (("convert", "none", "--config", "object.json", "-o", "out"), ["object.json: ", "vocab_size"]),
        (("train", "broken.yaml"), ["broken.yaml: not valid YAML", "line 1"]),
        (("info", "broken.yaml"), ["broken.yaml: not valid YAML", "line 1"]),
    ],
)
def test_mistakes_name_the_file_or_option(
    refuses: Run, places: None, command: tuple[str, ...], names: list[str]
) -> None:
    message = refuses(*command)
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "--sample", "--seed", 2**32),
        ("needle", "--threads", 99999),
        ("needle", "--samples", 10**12),
        ("eval", "perplexity", "--checkpoint", "none", "--data", "text", "--threads", 99999),
    ],
)
def test_numbers_beyond_sense_are_refused(drt: Run, command: tuple[Any, ...]) -> None:
    result = drt(*command)
    assert result.exit_code == 2
    assert command[-2] in result.output


def test_a_training_names_numbers_beyond_sense(refuses: Run, places: None) -> None:
    config = {
        "output_dir": "out",
        "model": {},
        "data": {"haystack": ["text"], "validation_haystack": ["text"]},
        "curriculum": [{"chunks": 8}],
    }
    for name, value in (("seed", 2**32), ("threads", 10**6)):
        Path("run.yaml").write_text(json.dumps(config | {name: value}))
        assert f"{name}: expected 0 to" in refuses("train", "run.yaml")
    Path("run.yaml").write_text(json.dumps("x" * 10**6))
    assert len(refuses("train", "run.yaml")) < 300


def test_a_report_into_a_file_is_named(refuses: Run, places: None) -> None:
    Path("records.jsonl").write_text(
        json.dumps(
            {"task": "training", "checkpoint": "a", "device": "cpu", "dtype": "float32", "architecture": "drt",
             "parameters": 1, "seed": 0, "steps": 1, "training_tokens": 1, "seconds": 1.0}
        ) + "\n"
    )  # fmt: skip
    assert refuses("report", "records.jsonl", "-o", "text").startswith("text: expected a folder")
