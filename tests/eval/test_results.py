"""Records: one line each, read back exactly; files that were cut short; summaries."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drt.errors import DRTError
from drt.eval.results import (
    AnswerRecord,
    EvaluationRecord,
    NeedleRecord,
    PerplexityRecord,
    RecordWriter,
    TrainingRecord,
    format_length,
    from_line,
    read_records,
    summarise,
    to_line,
)

MakeRecord = Callable[..., NeedleRecord]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generated": 'a "quoted"\n|line\u2028 and \U0001f600', "correct": True},
        {"peak_device_bytes": 5, "settings": {"hops": 2, "chains": 3}, "haystack": []},
        {"prefill_seconds": 3},  # JSON does not tell 3 from 3.0
    ],
)
def test_a_record_comes_back(make_record: MakeRecord, changes: dict[str, Any]) -> None:
    line = to_line(make_record(**changes))
    assert "\n" not in line
    assert from_line(line) == make_record(**changes)


def test_the_fields_that_tables_and_other_programs_read(make_record: MakeRecord) -> None:
    fields = [
        "task",
        "length",
        "depth",
        "expected",
        "generated",
        "correct",
        "tokens_per_second",
        "peak_rss_bytes",
    ]
    assert set(fields) <= json.loads(to_line(make_record())).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": "1024"}, "length: expected int, got '1024'"),
        ({"length": 1024.0}, r"length: expected int, got 1024\.0"),
        ({"length": True}, "length: expected int, got True"),
        ({"correct": 1}, "correct: expected bool, got 1"),
        ({"depth": None}, "depth: expected float, got None"),
        ({"depth": False}, "depth: expected float, got False"),
        ({"expected": 12345}, "expected: expected str, got 12345"),
        ({"peak_device_bytes": "0"}, r"peak_device_bytes: expected int \| None"),
        ({"haystack": "words"}, r"haystack: expected list\[str\]"),
        ({"haystack": [1]}, r"haystack: expected list\[str\]"),
        ({"settings": {"hops": 2.5}}, r"settings: expected dict\[str, int\]"),
        ({"settings": []}, r"settings: expected dict\[str, int\]"),
        ({"memory_dtype": 8}, r"memory_dtype: expected str \| None"),
    ],
)
def test_values_of_another_type_are_refused(
    make_record: MakeRecord, changes: dict[str, Any], message: str
) -> None:
    line = json.dumps(json.loads(to_line(make_record())) | changes)
    with pytest.raises(ValueError, match=message):
        from_line(line)


def test_other_fields_are_refused(make_record: MakeRecord) -> None:
    values = json.loads(to_line(make_record()))
    values["accuracy"] = values.pop("correct")
    with pytest.raises(ValueError, match=r"missing \['correct'\], unknown \['accuracy'\]"):
        from_line(json.dumps(values))


def test_records_of_an_earlier_release_are_read(make_record: MakeRecord) -> None:
    values = json.loads(to_line(make_record()))
    del values["memory_dtype"]
    assert from_line(json.dumps(values)) == make_record()


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "null"])
def test_what_is_no_object_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|expected a JSON object"):
        from_line(line)


COMMON = {"checkpoint": "tiny", "device": "cpu", "dtype": "float32"}
OTHERS: list[EvaluationRecord] = [
    PerplexityRecord(
        task="perplexity",
        data="corpus",
        document="a",
        index=0,
        length=3,
        positions=[2, 4],
        tokens=[1, 1],
        bytes=[1, 4],
        losses=[2.5, 1],
        seconds=0.5,
        peak_rss_bytes=1,
        peak_device_bytes=None,
        batch_size=1,
        **COMMON,
    ),
    AnswerRecord(
        task="summarization",
        data="news",
        index=0,
        length=9,
        expected=["x"],
        generated="y",
        scores={"rouge1": 0.5},
        **COMMON,
    ),
    TrainingRecord(
        task="training",
        architecture="drt",
        parameters=5,
        seed=0,
        steps=1,
        training_tokens=2,
        seconds=0.1,
        **COMMON,
    ),
]


def test_a_file_holds_any_mix_of_records(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "records.jsonl"
    records = [OTHERS[0], make_record(), *OTHERS[1:]]
    write(path, records)
    assert read_records(path, EvaluationRecord) == records


def test_a_record_of_another_kind_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "records.jsonl"
    write(path, [make_record(), OTHERS[0]])
    message = r"records.jsonl, line 2: expected a NeedleRecord, got a PerplexityRecord \(perplexity\)"
    with pytest.raises(DRTError, match=message):
        read_records(path, NeedleRecord)


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"losses": [1, "2"]}, r"losses: expected list\[float\]"),
        (0, {"tokens": [1.5]}, r"tokens: expected list\[int\]"),
        (1, {"scores": {"rouge1": None}}, r"scores: expected dict\[str, float\]"),
        (2, {"stepz": 3}, r"fields of a TrainingRecord; missing \[\], unknown \['stepz'\]"),
    ],
)
def test_damaged_records_of_each_kind_are_refused(number: int, changes: dict[str, Any], message: str) -> None:
    line = json.dumps(json.loads(to_line(OTHERS[number])) | changes)
    with pytest.raises(ValueError, match=message):
        from_line(line)


def write(path: Path, records: Sequence[EvaluationRecord], append: bool = False) -> None:
    with RecordWriter(path, append) as writer:
        for record in records:
            writer.write(record)


def test_a_file_of_records(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "records.jsonl"
    records = [make_record(index=index) for index in range(3)]
    write(path, records)
    assert read_records(path, NeedleRecord) == read_records(str(path), NeedleRecord) == records
    write(path, records[:1])  # begins anew
    assert read_records(path, NeedleRecord) == records[:1]
    write(path, records[1:], append=True)
    assert read_records(path, NeedleRecord) == records


def test_every_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        for count in (1, 2):
            writer.write(make_record())
            assert len(read_records(path, NeedleRecord)) == count


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, make_record: MakeRecord, kept: int) -> None:
    path = tmp_path / "records.jsonl"
    records = [make_record(index=index, generated="é\n") for index in range(3)]
    write(path, records)
    whole = path.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    path.write_bytes(whole[: last + kept] if kept > 0 else whole[:kept])
    assert read_records(path, NeedleRecord) == records[:2]
    write(path, records[2:], append=True)
    assert path.read_bytes() == whole


def test_to_append_to_nothing_begins_a_file(tmp_path: Path, make_record: MakeRecord) -> None:
    write(tmp_path / "new.jsonl", [make_record()], append=True)
    (tmp_path / "cut.jsonl").write_text('{"task": "sin')  # killed in its first line
    assert read_records(tmp_path / "cut.jsonl", NeedleRecord) == []
    write(tmp_path / "cut.jsonl", [make_record()], append=True)
    assert (
        read_records(tmp_path / "new.jsonl", NeedleRecord)
        == read_records(tmp_path / "cut.jsonl", NeedleRecord)
        == [make_record()]
    )


def test_a_line_that_is_no_record_is_named(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{to_line(make_record())}\n{{}}\n{to_line(make_record())}\n")
    with pytest.raises(DRTError, match=re.escape(f"{path}, line 2: not an evaluation record: expected the")):
        read_records(path, NeedleRecord)


ABSURD: list[tuple[int | None, dict[str, Any]]] = [
    (None, {"length": 0}),
    (None, {"length": -1}),
    (None, {"length": 10**30}),
    (None, {"depth": 1.5}),
    (None, {"depth": math.nan}),
    (None, {"prefill_seconds": 0.0}),
    (None, {"peak_rss_bytes": -1}),
    (None, {"settings": {"needles": -1}}),
    (0, {"losses": [math.nan, 1.0]}),
    (0, {"losses": [math.inf, 1.0]}),
    (0, {"losses": [2.5]}),
    (0, {"positions": [4, 2]}),
    (0, {"positions": [1, 2]}),
    (0, {"positions": [0, 4]}),
    (0, {"tokens": [0, 0]}),
    (0, {"positions": [], "tokens": [], "bytes": [], "losses": []}),
    (1, {"scores": {"rouge1": math.inf}}),
    (2, {"parameters": -(2**70)}),
]


@pytest.mark.parametrize(("other", "changes"), ABSURD, ids=str)
def test_values_that_cannot_be_are_refused(
    make_record: MakeRecord, other: int | None, changes: dict[str, Any]
) -> None:
    record = make_record() if other is None else OTHERS[other]
    assert from_line(to_line(record)) == record
    with pytest.raises(ValueError, match="expected"):
        from_line(json.dumps(json.loads(to_line(record)) | changes))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"length": ' + "9" * 5000 + "}"]
)
def test_a_line_of_any_depth_or_size_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"expected|nested|digits"):
        from_line(line)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
def test_records_are_read_from_regular_files(tmp_path: Path, make_record: MakeRecord, kind: str) -> None:
    path = tmp_path / "records.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DRTError, match=r"expected a regular file, got a (pipe|link to a device|folder)"):
        read_records(path, NeedleRecord)
    write(tmp_path / "real", [make_record()])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_records(tmp_path / "link", NeedleRecord) == [make_record()]


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(DRTError, match=re.escape(f"{path}: cannot be read")):
        read_records(path, NeedleRecord)
    path.write_bytes(b"\xff\n")
    with pytest.raises(DRTError, match=re.escape(f"{path}: cannot be read as records")):
        read_records(path, NeedleRecord)
    for append in (False, True):
        with pytest.raises(DRTError, match="below: cannot be written"):
            RecordWriter(path / "below", append)


def test_summaries(make_record: MakeRecord) -> None:
    records = [
        make_record(task="multikey", length=64, correct=True, prefill_seconds=1.0),
        make_record(length=128, prefill_seconds=2.0, decode_seconds_per_token=0.1, peak_rss_bytes=5),
        make_record(length=128, prefill_seconds=6.0, decode_seconds_per_token=0.3, peak_rss_bytes=9),
        make_record(length=64, correct=True, peak_device_bytes=3),
        make_record(length=128, checkpoint="other", correct=True, peak_device_bytes=4),
    ]
    found = summarise(records)
    assert [(row.checkpoint, row.task, row.length, row.correct, row.samples) for row in found] == [
        ("tiny", "multikey", 64, 1, 1),
        ("tiny", "single", 64, 1, 1),
        ("tiny", "single", 128, 0, 2),
        ("other", "single", 128, 1, 1),
    ]
    both = found[2]
    assert both.prefill_seconds == 4.0  # of a text
    assert both.tokens_per_second == 2 * 128 / 8.0  # all tokens in all the time, not the mean of speeds
    assert both.decode_seconds_per_token == pytest.approx(0.2)
    assert both.peak_rss_bytes == 9
    assert [row.peak_device_bytes for row in found] == [None, 3, None, 4]
    assert summarise([]) == []


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1024, "1K"),
        (1025, "1025"),
        (65536, "64K"),
        (2**20, "1M"),
        (3 * 2**19, "1536K"),
    ],
)
def test_lengths_in_short(tokens: int, text: str) -> None:
    assert format_length(tokens) == text
