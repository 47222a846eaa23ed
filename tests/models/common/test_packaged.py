"""Saved folders: what tools read in them, and how they name the package that holds the code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_imports

from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.loading import shipped_checkpoint
from drt.registration import MODEL_TYPES

MODULE = "modeling_drt_lm"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_code_of_a_saved_folder_is_the_package(tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", f"{MODULE}.py"]
    found: dict[str, object] = {}
    exec((tmp_path / f"{MODULE}.py").read_text(), found)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    classes = {auto: found[name.removeprefix(f"{MODULE}.")] for auto, name in auto_map.items()}
    assert classes["AutoConfig"] is type(config)
    assert all(classes[auto].config_class is type(config) for auto in ("AutoModel", "AutoModelForCausalLM"))


def test_without_the_package_its_distribution_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the package index `drt` is another project: no tool may tell a user to install that."""
    DRTConfig().save_pretrained(tmp_path)
    path = tmp_path / f"{MODULE}.py"
    assert get_imports(path) == [], "what transformers would name as missing"
    monkeypatch.setitem(sys.modules, "drt.models.drt", None)
    with pytest.raises(ImportError, match=r"pip install drt-lm$"):
        exec(path.read_text(), {})


def test_the_shipped_folder_is_as_it_would_be_saved(tmp_path: Path) -> None:
    folder = shipped_checkpoint()
    DRTForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    for name in (f"{MODULE}.py", "config.json", "generation_config.json"):
        held, saved = ((place / name).read_text() for place in (folder, tmp_path))
        if name.endswith(".json"):
            held, saved = ({**json.loads(x), "transformers_version": ""} for x in (held, saved))
        assert held == saved
    assert AutoConfig.from_pretrained(folder).max_position_embeddings == 2**24, (
        "read and answered from, in README"
    )


def test_registering_copies_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DRTConfig.register_for_auto_class()
    DRTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    DRTForCausalLM(DRTConfig(hidden_size=24, num_attention_heads=2)).save_pretrained(tmp_path)
    assert "configuration_drt.py" not in names(tmp_path)
    assert "modeling_drt.py" not in names(tmp_path)


def test_a_context_length_that_tools_read(tmp_path: Path) -> None:
    for model_type in MODEL_TYPES:
        assert AutoConfig.for_model(model_type).max_position_embeddings == 2**20
        assert AutoConfig.for_model(model_type, max_position_embeddings=512).max_position_embeddings == 512
    with pytest.raises(StrictDataclassError, match="max_position_embeddings must be at least 1, got 0"):
        DRTConfig(max_position_embeddings=0)


def test_a_users_own_class_is_saved_as_in_the_library(tmp_path: Path) -> None:
    class OwnConfig(DRTConfig):
        model_type = "own"

    OwnConfig().save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json"]
    assert AutoModel is not None
