"""`drt generate`: where the text comes from, what comes out, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from drt.models import loading
from drt.models.drt import DRTForCausalLM

Run = Callable[..., Any]
PROMPT = "Once upon a time there was a window, and it slid over a long, long text."


@pytest.fixture
def generate(drt: Run, checkpoint: Path) -> Callable[..., str]:
    """What `drt generate` writes to stdout: 12 tokens; must succeed."""

    def run(*arguments: object, input: str | bytes | None = None) -> str:
        result = drt(
            *("generate", "--checkpoint", checkpoint, "--max-new-tokens", "12", "--device", "cpu"),
            *arguments,
            input=input,
        )
        assert result.exit_code == 0, result.output
        assert result.stderr == ""  # no bar where stderr is no terminal
        return result.stdout

    return run


@pytest.fixture
def refused(refuses: Run, checkpoint: Path) -> Run:
    """The one line with which `drt generate` refuses."""
    return lambda *arguments, input=None: refuses(
        "generate", "--checkpoint", checkpoint, "--device", "cpu", *arguments, input=input
    )


def test_it_continues_greedily_as_the_model_does(generate: Run, checkpoint: Path) -> None:
    model = DRTForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert text
    assert generate(PROMPT).rstrip("\n") == text.rstrip("\n")


def test_wherever_the_text_comes_from_the_answer_is_the_same(generate: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    expected = generate(PROMPT)
    assert generate("--file", path) == expected
    assert generate("--file", "-", input=PROMPT) == expected
    assert generate(PROMPT, "--segment-size", "10") == expected


def test_the_whole_text_is_read_and_no_special_token_added(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[int]] = []
    forward = DRTForCausalLM.generate

    def remember(self: DRTForCausalLM, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append(ids[0].tolist())
        return forward(self, ids, **options)

    monkeypatch.setattr(DRTForCausalLM, "generate", remember)
    generate("</s> é\n")
    assert given == [[byte + 3 for byte in "</s> é\n".encode()]]


def test_one_character_is_a_text(generate: Run) -> None:
    assert generate("a") != ""


def test_a_seed_repeats_what_was_sampled(generate: Run) -> None:
    drawn = {seed: generate(PROMPT, "--sample", "--seed", seed) for seed in (0, 1, 2)}
    assert len(set(drawn.values())) == 3
    assert generate(PROMPT, "--sample", "--seed", "1") == drawn[1]
    assert generate(PROMPT, "--sample") == drawn[0]


def test_little_temperature_or_little_probability_is_greedy(generate: Run) -> None:
    expected = generate(PROMPT)
    assert generate(PROMPT, "--sample", "--temperature", "0.001") == expected
    assert generate(PROMPT, "--sample", "--top-p", "0.0001") == expected


def test_fewer_tokens_are_the_first_of_more(generate: Run) -> None:
    few = generate(PROMPT, "--max-new-tokens", "3").rstrip("\n")
    assert generate(PROMPT).startswith(few)


def test_dtype(generate: Run) -> None:
    generate(PROMPT, "--dtype", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either a PROMPT or --file FILE"),
        (["text", "--file", "-"], "expected either a PROMPT or --file FILE"),
        ([""], "the prompt is empty"),
        (["--file", "-"], "the prompt is empty"),
        (["--file", "nothing.txt"], "nothing.txt: cannot be read: No such file or directory"),
        (["--file", "."], ".: expected a regular file, got a folder"),
        (["text", "--temperature", "0.5"], "--temperature: only with --sample"),
        (["text", "--top-p", "0.5", "--seed", "1"], "--top-p, --seed: only with --sample"),
        (["text", "--sample", "--temperature", "0"], "--temperature: expected a number above 0, got 0.0"),
        (["text", "--sample", "--temperature", "nan"], "--temperature: expected a number above 0, got nan"),
        (["text", "--sample", "--top-p", "0"], "--top-p: expected a probability in (0, 1], got 0.0"),
        (["text", "--sample", "--top-p", "1.5"], "--top-p: expected a probability in (0, 1], got 1.5"),
        (["text", "--segment-size", "0"], "expected a length such as 4096, 64K or 1M, got '0'"),
        (["text", "--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["text", "--dtype", "int8"], "--dtype: expected float32 or bfloat16, got 'int8'"),
        (["text", "--checkpoint", "nothing"], "no checkpoint folder at nothing"),
    ],
)
def test_mistakes_are_one_line(refused: Run, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_text_that_is_not_utf8_is_refused(refused: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("ab Bücher".encode("latin-1"))
    assert re.search(r"latin\.txt is not UTF-8 text: .* at byte 4", refused("--file", path))
    assert "iconv -f WINDOWS-1252 -t UTF-8" in refused("--file", path)
    assert "- is not UTF-8 text" in refused("--file", "-", input=b"\xff\xfe")
    assert "the prompt is not UTF-8 text" in refused("ab\udcff")  # as Python hands on other bytes of argv


def test_an_installation_without_a_checkpoint_says_so(
    refuses: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    assert "ships no checkpoint needle-tiny" in refuses("generate", "text")
