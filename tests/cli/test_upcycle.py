"""`drt upcycle`: a pretrained model becomes a DRT model, with what a run trained or without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from drt.models.drt import DRTForCausalLM
from drt.models.loading import load_model
from drt.train.adapters import add_lora, save_trained, trained_tensors
from drt.train.retrieval_config import LoraConfig

Run = Callable[..., Any]
CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


SIZES = ("--groups", "1", "--encoder-layers", "1", "--chunk-size", "15", "--window", "32", "--tokens", "128")


def test_the_folder_holds_a_model_its_tokenizer_and_where_it_came_from(
    drt: Run, base: Path, tmp_path: Path
) -> None:
    result = drt("upcycle", base, "-o", tmp_path / "out", *SIZES)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_model(tmp_path / "out")
    assert (model.config.num_lower_layers, model.config.chunk_size, len(tokenizer)) == (1, 15, 259)
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["base"]["files"] == ["model.safetensors"]
    assert f"{record['losses']['converted']:.4f}" in result.stdout
    assert record["losses"]["converted"] == pytest.approx(record["losses"]["base_with_window"], abs=0.05)


def test_what_a_run_trained_is_put_in(drt: Run, refuses: Run, base: Path, tmp_path: Path) -> None:
    assert drt("upcycle", base, "-o", tmp_path / "plain", *SIZES).exit_code == 0
    model, _ = load_model(tmp_path / "plain")
    assert isinstance(model, DRTForCausalLM)
    lora = LoraConfig(rank=2)
    add_lora(model, lora)
    tensors = {name: tensor + 0.1 for name, tensor in trained_tensors(model).items()}
    save_trained(tmp_path / "trained.safetensors", tensors, model.config, lora)
    arguments = ("upcycle", base, "-o", tmp_path / "out", "--trained", tmp_path / "trained.safetensors")
    result = drt(*arguments, "--tokens", "128")
    assert result.exit_code == 0, result.output
    trained, _ = load_model(tmp_path / "out")
    assert trained.config.chunk_size == 15
    name = "model.chunk_k_proj.weight"
    torch.testing.assert_close(trained.state_dict()[name], tensors[name], rtol=1e-2, atol=1e-3)
    assert "--groups" in refuses(*arguments, "--groups", "1")  # the file says the sizes


def test_mistakes_are_named(refuses: Run, base: Path, tmp_path: Path) -> None:
    assert "nowhere" in refuses("upcycle", tmp_path / "nowhere", "-o", tmp_path / "out")
    other = base / "model.safetensors"
    assert other.name in refuses("upcycle", base, "-o", tmp_path / "out", "--trained", other)
    assert "got 7" in refuses("upcycle", base, "-o", tmp_path / "out", "--lower-layers", "7")
    assert not (tmp_path / "out").exists()


def test_the_configuration_that_ships_is_read(drt: Run) -> None:
    result = drt("info", CONFIG)
    assert "data/smollm2-drt" in result.output  # all that is missing is what it converts
