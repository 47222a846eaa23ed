"""`import drt` is all that tools need: the Auto classes and lm-eval know the models, and nothing slow is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedConfig

from drt.registration import MODEL_TYPES

LOAD = """
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:]:
    print(json.dumps([type(AutoConfig.from_pretrained(folder, **options)).__name__,
                      type(AutoModelForCausalLM.from_pretrained(folder, **options)).__name__]))
"""
CLASSES = ["DRT", "Window", "FullAttention", "Landmark", "BlockRecurrent"]  # in the order of MODEL_TYPES


def config_of(model_type: str) -> PreTrainedConfig:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return AutoConfig.for_model(model_type, **sizes)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A small checkpoint of each model."""
    from transformers import AutoModelForCausalLM

    for model_type in MODEL_TYPES:
        AutoModelForCausalLM.from_config(config_of(model_type)).save_pretrained(tmp_path / model_type)
    return [tmp_path / model_type for model_type in MODEL_TYPES]


def run(code: str, folders: list[Path], tmp_path: Path) -> list[str]:
    """What a program of its own prints, a line each; remote code is copied to a place of the test's."""
    code = f"import json, os, sys\nos.environ['HF_MODULES_CACHE'] = {str(tmp_path / 'modules')!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def expected() -> list[list[str]]:
    return [[f"{name}Config", f"{name}ForCausalLM"] for name in CLASSES]


def test_auto_classes_after_importing_the_package(folders: list[Path], tmp_path: Path) -> None:
    imports = "import drt\nprint(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    lines = run(f"{imports}options = {{}}\n{LOAD}", folders, tmp_path)
    assert lines[0] == "[]"
    assert [json.loads(line) for line in lines[1:]] == expected()


def test_remote_code_is_the_installed_package(folders: list[Path], tmp_path: Path) -> None:
    """And what was loaded so is saved like everything else: no code of the package is copied."""
    save = (
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).save_pretrained(sys.argv[1] + '/again')"
    )
    lines = run(f"options = {{'trust_remote_code': True}}\n{LOAD}{save}", folders, tmp_path)
    assert [json.loads(line) for line in lines] == expected()
    assert sorted(path.name for path in (folders[0] / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_drt_lm.py",
    ]
    again, first = (json.loads((f / "config.json").read_text()) for f in (folders[0] / "again", folders[0]))
    assert again == first


def test_unknown_model_types_stay_unknown() -> None:
    with pytest.raises(ValueError, match="Unrecognized model identifier: other"):
        AutoConfig.for_model("other")
    assert set(MODEL_TYPES) <= set(AutoConfig.for_model.__globals__["CONFIG_MAPPING"].keys())
