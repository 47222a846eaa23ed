"""Load a checkpoint folder, or say clearly what is wrong with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from drt.errors import DRTError
from drt.models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.drt.embedder import attach_embedder
from drt.models.full_attention import FullAttentionConfig, FullAttentionForCausalLM
from drt.models.landmark import LandmarkConfig, LandmarkForCausalLM
from drt.models.window import WindowConfig, WindowForCausalLM

SHIPPED = Path(__file__).parents[1] / "checkpoints"
_MODELS: dict[str, type[PreTrainedModel]] = {
    DRTConfig.model_type: DRTForCausalLM,
    WindowConfig.model_type: WindowForCausalLM,
    FullAttentionConfig.model_type: FullAttentionForCausalLM,
    LandmarkConfig.model_type: LandmarkForCausalLM,
    BlockRecurrentConfig.model_type: BlockRecurrentForCausalLM,
}
_SHOWN = 5  # problems listed in one message


def shipped_checkpoint(name: str = "needle-tiny") -> Path:
    """The folder of a checkpoint that ships inside the package.

    Raises:
        DRTError: there is none of that name.
    """
    folder = SHIPPED / name
    if not folder.is_dir():
        raise DRTError(
            f"this installation of drt ships no checkpoint {name}; name a folder with --checkpoint"
        )
    return folder


def load_model(
    path: Path | str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a checkpoint folder; never runs pickled code, never uses the network.

    Args:
        path: folder with config.json, model.safetensors and the tokenizer's files, as `save_pretrained` writes them.
        dtype: of the weights. Default: as they are stored.

    Returns:
        The model on the CPU, in eval mode, and its tokenizer.

    Raises:
        DRTError: no such folder, a model of another architecture, a file that is missing or damaged, weights whose
            names or shapes are not those of the configuration, an embedding retriever without its embedder.
    """
    folder = Path(path)
    model_class = _model_class(folder)
    try:
        model, info = _load_weights(model_class, folder, dtype)
    except (StrictDataclassError, ValueError) as error:
        raise DRTError(f"{folder / 'config.json'}: {error.__cause__ or error}") from error
    except SafetensorError as error:
        raise DRTError(f"the weights in {folder} are truncated or damaged: {error}") from error
    except OSError as error:
        raise DRTError(f"the weights in {folder} cannot be read: {error}") from error
    problems = _describe(info)
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
        raise DRTError(f"the weights in {folder} do not fit its config.json: {shown}")
    tokenizer = load_tokenizer(folder)
    attach_embedder(model, tokenizer)
    return model.eval(), tokenizer


def load_model_config(path: Path | str) -> PreTrainedConfig:
    """The configuration of a checkpoint folder.

    Raises:
        DRTError: no such folder, a model of another architecture, a config.json that is missing or does not fit.
    """
    folder = Path(path)
    model_class = _model_class(folder)
    try:
        return cast(Any, model_class).config_class.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, ValueError, OSError) as error:
        raise DRTError(f"{folder / 'config.json'}: {error.__cause__ or error}") from error


def _model_class(folder: Path) -> type[PreTrainedModel]:
    """The class that config.json asks for."""
    if not folder.is_dir():
        raise DRTError(f"no checkpoint folder at {folder}")
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DRTError(f"{folder} is not a checkpoint folder: {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise DRTError(f"{path} is damaged, not JSON: {error}") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(model_type, str) or model_type not in _MODELS:
        raise DRTError(f"{path}: wanted model_type {', '.join(_MODELS)}, got {model_type!r}")
    return _MODELS[model_type]


def _load_weights(
    model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which weights did not fit. What does not fit is reported once, by our error; no bar is shown."""
    reporter = logging.getLogger("transformers.modeling_utils")
    shows_bars = transformers_logging.is_progress_bar_enabled()
    # A filter: when the logger's level is raised, the library checks and prints more.
    reporter.addFilter(_is_error)
    transformers_logging.disable_progress_bar()
    try:
        loaded = model_class.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)  # a pair, as output_loading_info asks
    finally:
        reporter.removeFilter(_is_error)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _describe(info: dict[str, Any]) -> list[str]:
    """One line for each weight that did not fit."""
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unknown {name}" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} is {tuple(got)}, wanted {tuple(wanted)}"
        for name, got, wanted in sorted(info["mismatched_keys"])
    ]
    return problems


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        DRTError: there is no folder, no tokenizer in it, or it cannot be read.
    """
    if not folder.is_dir():
        raise DRTError(f"no checkpoint folder at {folder}")
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise DRTError(f"{folder} holds no tokenizer; save the one that the model was trained with into it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Attributes, keys and types: the library trusts that the JSON files hold objects.
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DRTError(f"the tokenizer in {folder} cannot be read: {error}") from error
