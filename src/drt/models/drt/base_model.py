"""Load the pretrained model that a conversion starts from: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from drt.errors import DRTError

GGUF = ".gguf"


class BaseModel(NamedTuple):
    """A pretrained model in float32 on the CPU, its tokenizer, and where they came from: `name`, `files`, `sha256`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict[str, Any]


def load_base(path: Path | str) -> BaseModel:
    """Load a pretrained causal language model; never runs code of the checkpoint, never uses the network.

    Args:
        path: folder with config.json, .safetensors files and a tokenizer; or a .gguf file, whose weights are
            dequantized.

    Raises:
        DRTError: no such folder or file, a file that is damaged or missing, the gguf package is not installed.
    """
    path = Path(path)
    if path.is_dir():
        folder, gguf, weights = path, None, sorted(path.glob("*.safetensors"))
        if not weights:
            raise DRTError(
                f"{path}: expected a folder with .safetensors files, got none; or give a .gguf file"
            )
    elif path.is_file() and path.suffix == GGUF:
        folder, gguf, weights = path.parent, path.name, [path]
    else:
        raise DRTError(f"{path}: expected a folder with .safetensors files or a .gguf file")
    model, tokenizer = _load(folder, gguf)
    source = {
        "name": path.resolve().name,
        "files": [file.name for file in weights],
        "sha256": [_sha256(file) for file in weights],
        "dequantized": gguf is not None,
    }
    return BaseModel(model.eval(), tokenizer, source)


def _load(folder: Path, gguf: str | None) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    of_weights = {**settings, "dtype": torch.float32, "use_safetensors": True}
    if gguf is not None:
        try:
            import gguf as _  # noqa: F401 (transformers reads the file with it)
            from transformers import GgufConfig
        except ImportError as error:
            raise DRTError(
                f'reading a .gguf file needs the gguf package: pip install "drt-lm[gguf]" ({error})'
            ) from error
        settings["gguf_file"] = gguf
        of_weights = {**settings, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **of_weights)
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise DRTError(f"{folder / gguf if gguf else folder}: cannot be loaded: {error}") from error
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    if gguf is not None:
        align_special_tokens(tokenizer, model.config)
    return model, tokenizer


def align_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a tokenizer the special tokens that the model's configuration names.

    transformers 5.17 reads the end token of a .gguf file's tokenizer wrong, and that of its configuration right.
    """
    for name in ("bos", "eos", "pad"):
        wanted = getattr(config, f"{name}_token_id")
        if isinstance(wanted, int) and getattr(tokenizer, f"{name}_token_id") != wanted:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(wanted))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
