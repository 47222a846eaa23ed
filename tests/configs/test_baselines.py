"""The runs that are compared have equal parameters and one recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import drt.models  # noqa: F401  (registers them)
from drt.train.config import load_config
from drt.train.models import make_model_config

FOLDER = Path(__file__).parents[2] / "configs" / "baselines"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def count_parameters(name: str) -> int:
    fields = read(name)["model"]
    with torch.device("meta"):
        config = AutoConfig.for_model(fields.pop("model_type"), vocab_size=8192, **fields)
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_are_baselines():
    assert {"window", "window-plus-2", "landmark", "drt-x1", "drt-x2", "drt-bm25"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_drt(name):
    assert abs(count_parameters(name) / count_parameters("drt-x2") - 1) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_only_the_model_differs(name):
    ours, other = read(name), read("drt-x2")
    assert ours.pop("output_dir") == f"runs/baselines/{name}"
    del other["output_dir"], ours["model"], other["model"]
    assert ours == other
    assert load_config(FOLDER / f"{name}.yaml").output_dir == f"runs/baselines/{name}"


def needle_models() -> dict[str, dict]:
    """The models that docs/recipe.md trains on needles."""
    text = (FOLDER.parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    (shared,) = re.findall(r'"model=\{\$2, (.*)\}"', text)
    return {
        name: yaml.safe_load(f"{{{own}, {shared}}}")
        for name, own in re.findall(r'needles (\S+) "(.*)"', text)
    }


@pytest.mark.parametrize("name", ["window", "full-attention", "landmark", "block-recurrent"])
def test_needle_models_are_as_large_as_the_drt_beside_them(name):
    text = (FOLDER.parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    narrow = re.findall(r"--set (model\.\w+=\d+)", text)
    assert len(narrow) == 3
    fields = needle_models()[name]
    sizes = []
    for overrides in (narrow, ["chunk_size=31", f"model={json.dumps(fields)}"]):
        config = load_config(FOLDER.parent / "needle-tiny.yaml", overrides)
        with torch.device("meta"):
            sizes.append(AutoModelForCausalLM.from_config(make_model_config(config)).num_parameters())
    assert abs(sizes[1] / sizes[0] - 1) < 0.003
