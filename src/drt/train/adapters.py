"""What of a converted model is new, what came from its base, and low-rank changes of the latter (PEFT's LoRA)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from drt.errors import DRTError
from drt.files import atomic_write, open_regular
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.upcycle import UpcycleOptions
from drt.train.retrieval_config import LoraConfig

TRAINED_FILE = "trained.safetensors"
# Parts of `DRTModel` that a plain decoder does not have.
_NEW = (
    "landmark_embedding",
    "chunk_encoder",
    "chunk_k_proj",
    "chunk_v_proj",
    "retrievers",
    "grouped_cross_attention",
)
_ADAPTED = r".*\.(lower|upper)_layers\.\d+\.(window_attention\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def is_new(name: str) -> bool:
    """Whether a parameter belongs to what a conversion added."""
    return any(part in _NEW for part in name.split("."))


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze what came from the base, and add low-rank changes to its linear layers, in place.

    The changes start at zero: the model computes what it did.

    Raises:
        DRTError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise DRTError(f'lora needs PEFT: pip install "drt-lm[lora]" ({error})') from error
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    lora = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=_ADAPTED, lora_dropout=0.0)
    peft.inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name) or ".lora_" in name)


def merge_lora(model: PreTrainedModel) -> None:
    """Add the changes of `add_lora` to the weights and remove them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    model.requires_grad_(True)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes, by name, on the CPU: with LoRA the new parts and the low-rank changes."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class TrainedFile(NamedTuple):
    """What a run trained beside its base, and the sizes that it fits."""

    tensors: dict[str, Tensor]
    options: UpcycleOptions
    lora: LoraConfig


def save_trained(path: Path, tensors: Mapping[str, Tensor], config: DRTConfig, lora: LoraConfig) -> None:
    """Write what was trained in bfloat16: the base is not in it."""
    options = {item.name: getattr(config, item.name) for item in fields(UpcycleOptions)}
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "options": json.dumps(options), "lora": json.dumps(asdict(lora))}
    with atomic_write(path) as file:
        file.write(save(rounded, metadata))


def read_trained(path: Path | str) -> TrainedFile:
    """Read what `save_trained` wrote.

    Raises:
        DRTError: the file cannot be read, or is none of a retrieval run's.
    """
    os.close(open_regular(path))
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            options = UpcycleOptions(**json.loads(metadata["options"]))
            lora = LoraConfig(**json.loads(metadata["lora"]))
            return TrainedFile({name: file.get_tensor(name) for name in file.keys()}, options, lora)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DRTError(
            f"{path}: expected the {TRAINED_FILE} of a run with task retrieval: {error!r}"
        ) from error


@torch.no_grad()
def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put trained parameters back.

    Args:
        model: with LoRA where the tensors were trained with it.
        tensors: as `trained_tensors` gives them.
        source: where they come from, for messages.

    Raises:
        DRTError: other names or shapes than the model trains.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    differing = sorted(own.keys() ^ tensors.keys())
    differing += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if differing:
        raise DRTError(
            f"{source}: expected the parameters that this model trains; {len(differing)} differ, such as "
            f"{differing[0]}; check lora.rank and init_from"
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
