"""`drt needle` evaluates the baselines as it does DRT."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", ["window", "full_attention", "landmark", "block_recurrent"])
def test_needles_are_asked_of_a_baseline(drt, tmp_path, name):
    folder = tmp_path / name
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL)).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    options = ["--length", "1K,2K", "--samples", 1, "--segment-size", 300, "--json", "out.jsonl"]
    result = drt("needle", "--checkpoint", folder, *options)
    assert result.exit_code == 0, result.output
    with open("out.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert [record["length"] for record in records] == [1024, 2048]
    assert all(record["checkpoint"] == str(folder) for record in records)
