"""`drt needle` as a user runs it: what it writes, what it repeats, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from drt.eval.results import NeedleRecord, read_records
from drt.models import loading
from drt.models.drt import DRTForCausalLM
from drt.terminal import INTERRUPTED

Run = Callable[..., Any]
SHORT = ("--length", "512", "--samples", "2", "--device", "cpu")


@pytest.fixture
def needle(drt: Run, checkpoint: Path) -> Run:
    """`drt needle` on two texts of 512 tokens, with more options; must succeed."""

    def run(*options: object) -> Any:
        result = drt("needle", *SHORT, "--checkpoint", checkpoint, *options)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def refused(refuses: Run, checkpoint: Path) -> Run:
    """The one line with which `drt needle` refuses; leaves no records."""

    def run(*options: object) -> str:
        found = refuses("needle", *SHORT, "--checkpoint", checkpoint, *options)
        assert not Path("needle.jsonl").exists()
        assert not Path("needle.png").exists()
        return found

    return run


def answers(path: Path | str = "needle.jsonl") -> list[tuple[Any, ...]]:
    """What does not depend on how fast it went."""
    return [(r.task, r.length, r.index, r.expected, r.generated) for r in read_records(path, NeedleRecord)]


def test_records_picture_and_table(needle: Run, checkpoint: Path) -> None:
    result = needle()
    lines = [json.loads(line) for line in Path("needle.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["task"], line["length"], line["depth"]) for line in lines] == [
        ("single", 512, 0.25),
        ("single", 512, 0.75),
    ]
    for line in lines:
        assert re.fullmatch(r"\d{5}", line["expected"])
        assert line["correct"] is False  # a model that knows nothing; the command succeeds all the same
        assert isinstance(line["generated"], str)
        assert line["tokens_per_second"] > 0
        assert line["peak_rss_bytes"] > 10**7
        assert line["checkpoint"] == str(checkpoint)
        assert line["haystack"] == ["sample"]
    assert Path("needle.png").read_bytes().startswith(b"\x89PNG")
    assert result.stderr == "single, 512: found 0 of 2\n"  # no bar where stderr is no terminal
    for shown in ("single", "0/2", "0.0%", "MB", "records: needle.jsonl, picture: needle.png"):
        assert shown in result.stdout


def test_options_reach_the_evaluation(needle: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of text " * 200)
    json_path, picture = tmp_path / "new" / "out.jsonl", tmp_path / "other" / "out.svg"
    needle(
        *("--length", "400,1K", "--task", "multikey,multihop", "--samples", "1", "--seed", "3"),
        *("--needles", "4", "--hops", "3", "--chains", "1", "--haystack", text, "--dtype", "bfloat16"),
        *("--json", json_path, "--plot", picture, "--batch-size", "1", "--threads", "1"),
        *("--segment-size", "200"),
    )
    records = read_records(json_path, NeedleRecord)
    assert [(record.length, record.task) for record in records] == [
        (400, "multikey"),
        (400, "multihop"),
        (1024, "multikey"),
        (1024, "multihop"),
    ]
    assert [record.settings for record in records[:2]] == [{"needles": 4}, {"hops": 3, "chains": 1}]
    assert {(record.seed, record.dtype, *record.haystack) for record in records} == {
        (3, "bfloat16", str(text))
    }
    assert b"<svg" in picture.read_bytes()


def test_how_chunks_are_held_is_recorded_and_gone_on_with(
    needle: Run, refuses: Run, checkpoint: Path
) -> None:
    needle("--memory-dtype", "int8")
    assert {record.memory_dtype for record in read_records("needle.jsonl", NeedleRecord)} == {"int8"}
    message = refuses("needle", *SHORT, "--checkpoint", checkpoint, "--resume")
    assert "another evaluation: memory_dtype is 'int8' there" in message


def test_a_seed_repeats_a_run_whatever_the_batches(needle: Run) -> None:
    needle("--json", "a.jsonl", "--batch-size", "1")
    needle("--json", "b.jsonl", "--batch-size", "2", "--segment-size", "300")
    needle("--json", "c.jsonl", "--seed", "8")
    assert answers("a.jsonl") == answers("b.jsonl")
    assert {record.batch_size for record in read_records("b.jsonl", NeedleRecord)} == {2}
    assert not {row[3] for row in answers("a.jsonl")} & {row[3] for row in answers("c.jsonl")}


def test_without_resume_the_records_are_replaced(needle: Run) -> None:
    needle("--samples", "1")
    needle("--samples", "1", "--seed", "8")
    assert [record.seed for record in read_records("needle.jsonl", NeedleRecord)] == [8]


def test_resume_does_only_the_rest(needle: Run) -> None:
    needle("--resume")  # nothing to go on with: begins
    whole = Path("needle.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    Path("needle.jsonl").write_bytes(lines[0] + lines[1][:40])  # killed while it wrote the second
    result = needle("--resume")
    again = Path("needle.jsonl").read_bytes().splitlines(keepends=True)
    assert again[0] == lines[0]
    assert len(again) == 2
    expected = [(r["index"], r["expected"], r["generated"]) for r in map(json.loads, lines)]
    assert [(r["index"], r["expected"], r["generated"]) for r in map(json.loads, again)] == expected
    assert "0/2" in result.stdout  # the table is of all


def test_resume_of_what_is_finished_reads_nothing(needle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    needle()
    before = Path("needle.jsonl").read_bytes()
    Path("needle.png").unlink()
    monkeypatch.setattr(DRTForCausalLM, "forward", lambda *inputs, **options: pytest.fail("reads a text"))
    needle("--resume")
    assert Path("needle.jsonl").read_bytes() == before
    assert Path("needle.png").exists()


def test_resume_refuses_records_of_something_else(needle: Run, drt: Run, checkpoint: Path) -> None:
    needle()
    before = Path("needle.jsonl").read_bytes()
    result = drt("needle", *SHORT, "--checkpoint", checkpoint, "--resume", "--seed", "8")
    assert result.exit_code == 2
    assert "seed is 7 there" in result.stderr
    Path("broken.jsonl").write_text("no record\n")
    result = drt("needle", *SHORT, "--checkpoint", checkpoint, "--resume", "--json", "broken.jsonl")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: broken.jsonl, line 1: not an evaluation record")
    assert Path("broken.jsonl").read_text() == "no record\n"
    assert Path("needle.jsonl").read_bytes() == before


def test_ctrl_c_leaves_whole_records_and_says_how_to_go_on(
    drt: Run, needle: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = DRTForCausalLM.generate, []

    def interrupted(*inputs: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DRTForCausalLM, "generate", interrupted)
        result = drt("needle", *SHORT, "--checkpoint", checkpoint, "--batch-size", "1")
    assert result.exit_code == INTERRUPTED
    assert "stopped after 1 of 2 texts; their records are in needle.jsonl" in result.stderr
    assert "--resume" in result.stderr
    assert "Traceback" not in result.output
    assert Path("needle.jsonl").read_bytes().endswith(b"}\n")
    first = answers()
    assert len(first) == 1
    assert not Path("needle.png").exists()

    needle("--batch-size", "1", "--resume")
    needle("--batch-size", "1", "--json", "whole.jsonl")
    assert answers()[:1] == first
    assert answers() == answers("whole.jsonl")


def test_by_default_it_is_the_checkpoint_that_ships(
    drt: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "needle-tiny")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    result = drt("needle", *SHORT, "--samples", "1")
    assert result.exit_code == 0, result.output
    assert [record.checkpoint for record in read_records("needle.jsonl", NeedleRecord)] == ["needle-tiny"]


def test_an_installation_without_a_checkpoint_says_so(
    refuses: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    assert "ships no checkpoint needle-tiny; name a folder with --checkpoint" in refuses("needle", *SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "1Q"], "--length: expected a length such as 4096, 64K or 1M, got '1Q'"),
        (["--length", ""], "--length: expected a length such as 4096, 64K or 1M, got ''"),
        (["--length", "4K,"], "--length: expected a length such as 4096, 64K or 1M, got ''"),
        (["--length", "0"], "--length: expected a length such as 4096, 64K or 1M, got '0'"),
        (["--length", "9" * 5000], "--length: expected a length such as 4096, 64K or 1M, got '999"),
        (["--length", "12"], "length 12 is too short for single: expected at least 14 tokens"),
        (
            ["--length", "2M"],
            "the haystack (sample) is too short: expected 2097152 tokens of text, got 1290297",
        ),
        (["--task", "twohop"], "--task: expected tasks of single, multikey, multihop, got twohop"),
        (["--task", ""], "--task: expected tasks of single, multikey, multihop, got"),
        (["--segment-size", "big"], "--segment-size: expected a length such as 4096, 64K or 1M, got 'big'"),
        (["--haystack", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--checkpoint", "nothing"], "no checkpoint folder at nothing"),
        (["--plot", "picture.gif"], "--plot picture.gif: expected a file name that ends in .png, .pdf, .svg"),
        (["--plot", "picture"], "--plot picture: expected a file name that ends in"),
        (["--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "--device: got cuda:99, but PyTorch sees"),
        (["--dtype", "int8"], "--dtype: expected float32 or bfloat16, got 'int8'"),
    ],
)
def test_mistakes_are_one_line(refused: Run, options: list[str], message: str) -> None:
    assert message in refused(*options)


@pytest.mark.parametrize(
    "options", [["--samples", "0"], ["--seed", "-1"], ["--needles", "0"], ["--lenght", "4"]]
)
def test_options_that_typer_refuses(drt: Run, options: list[str]) -> None:
    result = drt("needle", *options)
    assert result.exit_code == 2
    assert options[0] in result.output


def test_a_haystack_that_is_no_text_is_named(refused: Run, tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(b"\x89PNG\0")
    assert f"{path} is not UTF-8 text" in refused("--haystack", path)


def test_outputs_are_checked_before_anything_is_read(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *inputs: pytest.fail("loads the model first"))
    blocked = tmp_path / "a file"
    blocked.touch()
    assert f"--json {blocked / 'out.jsonl'}: cannot be written" in refused("--json", blocked / "out.jsonl")
    assert f"--plot {blocked / 'out.png'}: cannot be written" in refused("--plot", blocked / "out.png")
    (tmp_path / "folder.png").mkdir()
    assert "got a folder" in refused("--plot", tmp_path / "folder.png")
    same = ("--json", "out/../a.png", "--plot", tmp_path / "here" / "a.png")
    assert refused(*same) == f"--plot {same[-1]}: expected a file of its own, got that of --json"
    assert not Path("a.png").exists()


def test_the_haystack_is_not_written_over(refused: Run, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("words " * 100)
    message = f"--json {book}: expected a file apart from what is read, got one of it"
    assert refused("--haystack", book, "--json", book) == message
    assert book.read_text() == "words " * 100


def test_a_mistake_leaves_earlier_records_as_they_are(needle: Run, drt: Run, checkpoint: Path) -> None:
    needle()
    before = Path("needle.jsonl").read_bytes()
    assert drt("needle", *SHORT, "--checkpoint", checkpoint, "--length", "512,2M").exit_code == 2
    assert drt("needle", *SHORT, "--checkpoint", "nothing").exit_code == 2
    assert Path("needle.jsonl").read_bytes() == before


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_weights_cut_short_are_named(refused: Run, broken: Path, size: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"the weights in {broken} are truncated or damaged" in refused("--checkpoint", broken)


def test_a_checkpoint_without_weights_is_named(refused: Run, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert f"the weights in {broken} cannot be read" in refused("--checkpoint", broken)


def test_a_checkpoint_without_a_tokenizer_is_named(refused: Run, broken: Path) -> None:
    for path in broken.glob("*token*"):
        path.unlink()
    assert f"{broken} holds no tokenizer" in refused("--checkpoint", broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 64},
            "config.json: hidden_size must be num_attention_heads x head_dim, got 64 and 2 x 16",
        ),
        ({"intermediate_size": 64}, "is (32, 48), expected (32, 64)"),
        ({"num_upper_layers": 4}, "do not fit its config.json: missing"),
        ({"num_upper_layers": 3}, "config.json: num_groups must divide num_upper_layers, got 2 and 3"),
        ({"chunk_size": "many"}, "config.json: Field 'chunk_size' expected int, got str (value: 'many')"),
        ({"model_type": "gpt2"}, ", got 'gpt2'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    refused: Run, broken: Path, changes: dict[str, Any], message: str
) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))
    assert message in refused("--checkpoint", broken)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_configuration_that_is_none_is_named(refused: Run, broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    assert str(broken / "config.json") in refused("--checkpoint", broken)


def test_a_checkpoint_of_another_architecture_is_named(refused: Run, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    message = refused("--checkpoint", folder)
    assert f"{folder / 'config.json'}: expected model_type drt, " in message
    assert ", got 'llama'" in message
