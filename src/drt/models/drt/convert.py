"""Convert checkpoints of the paper's authors to `DRTForCausalLM`.

Their landmark is a row of the tied embedding; ours is a parameter of its own, so that row is copied and the row stays
as an output class. Their zeroed landmark key among the S + 1 keys of a chunk is our ``sink``; where S is a multiple of
64 they have neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drt.errors import DRTError, naming
from drt.files import fill_folder, read_json
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.modeling_drt import DRTForCausalLM

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "encoder_layers": "num_encoder_layers",
    "enc_chunk_size": "chunk_size",
    "chunk_topk": "retrieval_top_k",
    "rms_norm_eps": "rms_norm_eps",
}

_RENAMES = [
    (r"^module\.", ""),  # their trainer saves the model inside DistributedDataParallel
    (r"^model\.enc_prenorm\.", "model.chunk_encoder.input_norm."),
    (r"^model\.encoder\.layers\.(\d+)\.self_attn\.", r"model.chunk_encoder.layers.\1."),
    (r"^model\.encoder\.layers\.(\d+)\.input_layernorm\.", r"model.chunk_encoder.layers.\1.input_norm."),
    (
        r"^model\.encoder\.layers\.(\d+)\.post_attention_layernorm\.",
        r"model.chunk_encoder.layers.\1.mlp_norm.",
    ),
    (r"^model\.encoder\.", "model.chunk_encoder."),
    (r"^model\.lmk_norms\.(\d+)\.", r"model.retrievers.\1.norm."),
    (r"\.self_attn\.", ".window_attention."),
    (r"\.gca\.pre_norm\.", ".grouped_cross_attention.norm."),
    (r"\.gca\.", ".grouped_cross_attention."),
    (r"_layers\.(.*)\.input_layernorm\.", r"_layers.\1.attention_norm."),
    (r"_layers\.(.*)\.post_attention_layernorm\.", r"_layers.\1.mlp_norm."),
]


def config_from_authors(settings: Mapping[str, Any]) -> DRTConfig:
    """Our configuration for theirs.

    Args:
        settings: their JSON configuration; ``decoder_layers`` is [lower layers, layers of group 1, ...].

    Raises:
        DRTError: a setting is missing, or asks for what this architecture does not have.
    """
    _check_settings(settings)
    lower, *groups = settings["decoder_layers"]
    try:
        return DRTConfig(
            **{ours: settings[theirs] for theirs, ours in _FIELDS.items()},
            num_lower_layers=lower,
            num_upper_layers=groups,
            sliding_window=settings["slide_window"] + 1,
            position_embedding="alibi" if settings.get("enable_alibi", True) else "rope",
            rope_theta=settings.get("rope_theta", 10000.0),
            tie_word_embeddings=settings.get("tie_word_embeddings", True),
            pad_token_id=settings.get("pad_id"),
            eos_token_id=settings.get("eos_id"),
            # Of chunks that fill their kernel's tiles alone they drop the landmark's key, and with it the sink.
            sink=settings["enc_chunk_size"] % 64 != 0,
            landmark_predicts=False,
            close_prompt=False,
        )
    except (StrictDataclassError, ValueError) as error:
        raise DRTError(f"the authors' configuration: {error.__cause__ or error}") from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Everything that is read here is there; the sizes that go into our configuration are checked by it."""
    wanted = [*_FIELDS, "decoder_layers", "slide_window", "chunk_id"]
    missing = [name for name in wanted if name not in settings]
    if missing:
        raise DRTError(f"the authors' configuration lacks {', '.join(missing)}")
    for name in ("vocab_size", "enc_chunk_size", "slide_window", "chunk_id"):
        if not isinstance(settings[name], int):
            raise DRTError(f"{name} must be a whole number, got {settings[name]!r}")
    if not 0 <= settings["chunk_id"] < settings["vocab_size"]:
        raise DRTError(
            f"chunk_id must be below vocab_size, got {settings['chunk_id']}, {settings['vocab_size']}"
        )
    layers = settings["decoder_layers"]
    if not isinstance(layers, list) or len(layers) < 2 or any(type(n) is not int or n < 1 for n in layers):
        raise DRTError(
            f"decoder_layers must be [lower, group, ...], whole numbers of at least 1, got {layers}"
        )
    if settings.get("hidden_act", "silu") != "silu":
        raise DRTError(f"hidden_act must be silu, got {settings['hidden_act']}")


def convert_state_dict(
    parameters: Mapping[str, Tensor], config: DRTConfig, chunk_id: int
) -> dict[str, Tensor]:
    """Rename the authors' parameters to ours.

    Args:
        parameters: by their names.
        config: as `config_from_authors` gives it.
        chunk_id: the embedding row that is their landmark.

    Raises:
        DRTError: no embedding, or one of another shape than the configuration's.
    """
    groups = enumerate(config.layers_per_group)
    theirs = [f"upper_layers.{group}.{layer}." for group, layers in groups for layer in range(layers)]
    numbers = {name: number for number, name in enumerate(theirs)}

    def renumber(found: re.Match[str]) -> str:
        number = numbers.get(found[0])  # a layer that no group has keeps its name, and is reported as unknown
        return found[0] if number is None else f"upper_layers.{number}."

    converted = {}
    for name, tensor in parameters.items():
        if name.endswith(".self_attn.m"):  # slopes of ALiBi, which follow from the number of heads
            continue
        ours = re.sub(r"upper_layers\.\d+\.\d+\.", renumber, name)
        for pattern, replacement in _RENAMES:
            ours = re.sub(pattern, replacement, ours)
        converted[ours] = tensor
    if "model.embed_tokens.weight" not in converted:
        raise DRTError("the checkpoint holds no model.embed_tokens.weight: is it one of the authors'?")
    embedding = converted["model.embed_tokens.weight"]
    if embedding.shape != (config.vocab_size, config.hidden_size):
        raise DRTError(
            f"model.embed_tokens.weight is {tuple(embedding.shape)}, expected {config.vocab_size, config.hidden_size}"
        )
    converted["model.landmark_embedding"] = embedding[chunk_id].clone()
    if config.tie_word_embeddings:
        converted.setdefault("lm_head.weight", embedding)
    return converted


def convert_authors_checkpoint(
    path: Path | str, config_json: Path | str, output_dir: Path | str
) -> DRTForCausalLM:
    """Convert a checkpoint file or folder and save it with `save_pretrained`.

    Args:
        path: ``.safetensors``, ``.bin`` or ``.pt`` file of parameters, or a folder that holds one.
        config_json: their configuration.
        output_dir: where the converted model is written.

    Returns:
        The converted model.

    Raises:
        DRTError: a file that is missing or not readable, parameters that do not fit the configuration, or an output
            that cannot be written or is a link, device or pipe.
    """
    settings = read_json(config_json, follow=True)
    if not isinstance(settings, dict):
        raise DRTError(f"{config_json}: expected a JSON object, got {type(settings).__name__}")
    with naming(config_json):
        config = config_from_authors(settings)
    parameters = _load_parameters(Path(path))
    model = DRTForCausalLM(config)
    with naming(path):
        converted = convert_state_dict(parameters, config, settings["chunk_id"])
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in converted]
    problems += [f"unknown {name}" for name in converted if name not in expected]
    problems += [
        f"{name} is {tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if problems:
        raise DRTError(f"{path} does not fit {config_json}: {'; '.join(problems[:5])}")
    model.load_state_dict(converted)
    try:
        with fill_folder(output_dir) as folder:
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise DRTError(f"{output_dir}: cannot be written: {error}") from error
    return model


def _load_parameters(path: Path) -> dict[str, Tensor]:
    """Parameters of a file, or of the first known file in a folder; never runs pickled code."""
    if path.is_dir():
        known = [
            path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()
        ]
        if not known:
            raise DRTError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
        path = known[0]
    if not path.is_file():
        raise DRTError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        parameters = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise DRTError(
            f"{path} holds something other than tensors, or is damaged; it was not loaded"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, LookupError, StructError) as error:
        raise DRTError(f"{path} cannot be read as a checkpoint of parameters: {error}") from error
    if not isinstance(parameters, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in parameters.items()
    ):
        raise DRTError(f"{path}: expected a dictionary of names and tensors, got something else")
    return parameters
