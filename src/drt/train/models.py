"""The model and the tokenizer that a run starts with."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import drt.models  # noqa: F401 (registers the models with the Auto classes)
from drt.data.corpus import TOKENIZER, read_manifest
from drt.data.tokenizer import BYTES, fingerprint
from drt.data.tokenizer import load_tokenizer as load_named_tokenizer
from drt.errors import DRTError
from drt.models.drt import DRTConfig
from drt.models.loading import load_model, load_model_config, load_tokenizer
from drt.train.config import LanguageModelConfig, RunConfig


def make_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The corpus' tokenizer, else that of the checkpoint the run starts from, else bytes.

    Raises:
        DRTError: no corpus or no checkpoint, a damaged tokenizer, or a corpus of another one than the checkpoint's.
    """
    held = None if config.init_from is None else load_tokenizer(Path(config.init_from))
    if not isinstance(config, LanguageModelConfig):
        return load_named_tokenizer(BYTES) if held is None else held
    tokenizer = _corpus_tokenizer(config)
    if held is not None and fingerprint(held) != fingerprint(tokenizer):
        raise DRTError(
            f"init_from {config.init_from}: its tokenizer is not that of the corpus {config.data.corpus}; prepare the "
            f"corpus with --tokenizer {config.init_from}"
        )
    return tokenizer


def build_model(config: RunConfig) -> PreTrainedModel:
    """The model a run starts with: fresh weights, the same for the same seed, or those of `init_from`; in float32.

    Raises:
        DRTError: as `make_model_config`; weights that are missing or damaged.
    """
    model_config = make_model_config(config)
    set_seed(config.seed)
    if config.init_from is None:
        return AutoModelForCausalLM.from_config(model_config)
    model, _ = load_model(config.init_from, torch.float32)
    if isinstance(model_config, DRTConfig):
        model.config.gumbel_noise = model_config.gumbel_noise
        model.config.close_prompt = model_config.close_prompt
        cast(Any, model.generation_config).close_prompt = model_config.close_prompt
    return model


def make_model_config(config: RunConfig) -> PreTrainedConfig:
    """The configuration of the model a run starts with.

    Raises:
        DRTError: an unknown model_type, unknown or unfitting fields in the model section, no corpus, no checkpoint at
            `init_from`, or one of another architecture.
    """
    fields = dict(config.model)
    if config.init_from is not None:
        return _checkpoint_config(config, config.init_from)
    if isinstance(config, LanguageModelConfig) and "vocab_size" not in fields:
        fields |= _vocabulary_fields(config)
    model_type = fields.pop("model_type", "drt")
    try:
        config_class = type(AutoConfig.for_model(model_type))
    except ValueError as error:
        raise DRTError(f"model.model_type: expected drt or a baseline's, got {model_type!r}") from error
    return _make(config_class, _prompt_fields(config, config_class) | fields)


def _corpus_tokenizer(config: LanguageModelConfig) -> Any:
    """The tokenizer of the run's corpus.

    Raises:
        DRTError: no corpus, or the tokenizer in it is not the one that it was made with.
    """
    manifest = read_manifest(config.data.corpus)
    tokenizer = load_named_tokenizer(str(manifest.folder / TOKENIZER))
    wanted, found = manifest.tokenizer["fingerprint"], fingerprint(tokenizer)
    if found != wanted:
        raise DRTError(
            f"{manifest.folder / TOKENIZER} is not the tokenizer that the corpus was made with: expected "
            f"fingerprint {wanted[:12]}, got {found[:12]}"
        )
    return tokenizer


def _vocabulary_fields(config: LanguageModelConfig) -> dict[str, Any]:
    """Fields of the model's configuration that follow from the corpus' tokenizer.

    Raises:
        DRTError: no corpus.
    """
    described = read_manifest(config.data.corpus).tokenizer
    fields = {"vocab_size": described["vocab_size"]}
    return (
        fields if described["document_end"] is None else fields | {"eos_token_id": described["document_end"]}
    )


def _prompt_fields(config: RunConfig, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a model of that configuration must know of the rows that it learns from."""
    return {"close_prompt": config.closes_prompts} if issubclass(kind, DRTConfig) else {}


def _checkpoint_config(config: RunConfig, folder: str) -> PreTrainedConfig:
    """The checkpoint's configuration; what the model section names must be in it, but for what belongs to a run."""
    fields = dict(config.model)
    held = load_model_config(folder)
    kind = type(held)
    model_type = fields.pop("model_type", held.model_type)
    if model_type != held.model_type:
        raise _other_architecture(folder, [("model_type", held.model_type, model_type)])
    _check_names(kind, fields)
    own = {name: getattr(held, name) for name in _field_names(kind)}
    of_run = _prompt_fields(config, kind)
    of_run |= {name: fields.pop(name) for name in ("gumbel_noise", "close_prompt") if name in fields}

    def refuse(here: dict[str, Any]) -> None:
        if differing := [(name, own[name], value) for name, value in here.items() if value != own[name]]:
            raise _other_architecture(folder, differing)

    try:
        wanted = _make(kind, own | fields | of_run)  # null stands for a value that follows from others
    except DRTError:  # a field that differs need not fit the rest of the checkpoint
        refuse({name: value for name, value in fields.items() if value is not None})
        raise
    refuse({name: getattr(wanted, name) for name in fields})
    return wanted


def _other_architecture(folder: str, differing: list[tuple[str, Any, Any]]) -> DRTError:
    shown = "; ".join(f"model.{name}: {there!r} there, {here!r} here" for name, there, here in differing)
    return DRTError(f"init_from {folder}: a checkpoint of another architecture ({shown})")


def _make(kind: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedConfig:
    _check_names(kind, fields)
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError) as error:
        names = "|".join(_field_names(kind))
        reason = re.sub(rf"(?<![\w.])({names})(?!\w)", r"model.\1", str(error.__cause__ or error))
        raise DRTError(reason) from error


def _check_names(kind: type[PreTrainedConfig], fields: dict[str, Any]) -> None:
    known = _field_names(kind)
    for key in fields:
        if key not in known:
            raise DRTError(
                f"unknown key model.{key}; expected a field of {kind.__name__}: {', '.join(known)}"
            )


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    """A configuration's own fields, not the library's hundred others."""
    bases = [base for base in config_class.__mro__ if issubclass(base, PreTrainedConfig)]
    own = [name for base in bases if base is not PreTrainedConfig for name in inspect.get_annotations(base)]
    fields = {
        item.name for item in dataclasses.fields(config_class)
    }  # without what the class only says of itself
    return [name for name in dict.fromkeys(own) if name in fields]
