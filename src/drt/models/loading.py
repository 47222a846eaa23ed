"""Load a checkpoint folder, or say clearly what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from drt.data.tokenizer import read_tokenizer
from drt.errors import DRTError
from drt.files import check_inputs, read_json
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
    config = load_model_config(folder)
    model_class = _MODELS[config.model_type]
    _check_weights(model_class, config, folder)
    with _quiet():
        try:
            model = model_class.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            _check_generation(model)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DRTError(f"the weights in {folder} cannot be read: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise DRTError(f"{folder / 'generation_config.json'}: {error}") from error
    tokenizer = load_tokenizer(folder)
    attach_embedder(model, tokenizer)
    return model.eval(), tokenizer


def _check_generation(model: PreTrainedModel) -> None:
    """Raise ValueError for a generation configuration that no prompt could be read by."""
    config = model.generation_config
    size, closes = config.prefill_chunk_size, getattr(config, "close_prompt", None)
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"prefill_chunk_size must be a whole number of at least 1, got {size!r}")
    if closes is not None and type(closes) is not bool:
        raise ValueError(f"close_prompt must be true or false, got {closes!r}")


def load_model_config(path: Path | str) -> PreTrainedConfig:
    """The configuration of a checkpoint folder.

    Raises:
        DRTError: no such folder, a model of another architecture, a config.json that is missing or does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DRTError(f"no checkpoint folder at {folder}")
    check_inputs(folder)
    path = folder / "config.json"
    if not path.exists():
        raise DRTError(f"{folder} is not a checkpoint folder: it holds no {path.name}")
    settings = read_json(path, follow=True)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(model_type, str) or model_type not in _MODELS:
        raise DRTError(f"{path}: expected model_type {', '.join(_MODELS)}, got {model_type!r}")
    try:
        return cast(Any, _MODELS[model_type]).config_class.from_pretrained(folder, local_files_only=True)
    # The library trusts that a field holds what it should, and fails over what does not in as many ways.
    except Exception as error:
        raise DRTError(f"{path}: {error.__cause__ or error}") from error


def _check_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Compare what config.json asks for with the names and shapes in the files' headers, before memory is taken.

    Raises:
        DRTError: the files are missing or damaged, or do not hold the weights of the configuration.
    """
    found = _stored_shapes(folder)
    layers = config.num_hidden_layers + getattr(config, "num_encoder_layers", 0)
    if layers > len(found):  # said at once: a thousand layers take seconds to make, without any weights
        raise DRTError(
            f"the weights in {folder} do not fit its config.json: {len(found)} weights, expected {layers} layers"
        )
    with torch.device("meta"):
        model = model_class(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    tied = model.all_tied_weights_keys  # a name, and the name of the weight that it shares
    problems = [
        f"missing {name}"
        for name in sorted(wanted.keys() - found.keys())
        if name not in tied or tied[name] not in found
    ]
    problems += [f"unknown {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
        raise DRTError(f"the weights in {folder} do not fit its config.json: {shown}")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a folder holds, in one file or in several with an index."""
    files = {folder / SAFE_WEIGHTS_NAME}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not (folder / SAFE_WEIGHTS_NAME).exists() and index.exists():
        listed = read_json(index, follow=True)
        names = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in names.values()
        ):
            raise DRTError(f"{index}: expected a weight_map of weights to names of files in this folder")
        files = {folder / name for name in names.values()}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(files):
        if not path.is_file():
            raise DRTError(f"the weights in {folder} cannot be read: {path.name} is missing")
        try:
            with safe_open(path, framework="pt") as stored:
                names = stored.keys()  # of the handle, which is no mapping
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise DRTError(
                f"the weights in {folder} are truncated or damaged: {path.name}: {error}"
            ) from error
        except OSError as error:
            raise DRTError(f"the weights in {folder} cannot be read: {path.name}: {error}") from error
    return shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """While weights are loaded: no progress bar, and nothing but errors from the library."""
    reporter = logging.getLogger("transformers.modeling_utils")
    shows_bars = transformers_logging.is_progress_bar_enabled()
    # A filter: when the logger's level is raised, the library checks and prints more.
    reporter.addFilter(_is_error)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        reporter.removeFilter(_is_error)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


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
        return read_tokenizer(folder)
    except DRTError as error:
        raise DRTError(f"the tokenizer in {folder} cannot be read: {error}") from error
