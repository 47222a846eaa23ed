"""How many floating-point operations training takes: what the mathematics needs, not what an implementation does.

A multiplication and an addition are two operations. The backward pass takes twice the forward pass; what gradient
checkpointing computes again is not counted (that is the convention of MFU, "model FLOPs utilisation").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from drt.models.drt import DRTConfig
from drt.models.full_attention import FullAttentionConfig
from drt.models.window import WindowConfig

# Dense bfloat16 operations a second, by a part of the device's name, from the vendor's data sheets.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
_ONCE_A_TOKEN = ("lm_head", "chunk_k_proj", "chunk_v_proj")  # every other matrix also sees the landmarks


def training_flops(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Operations a token, forward and backward, in rows of `sequence_length` tokens.

    None for a model whose attention is not known here.
    """
    attention = attention_flops(model.config, sequence_length)
    return None if attention is None else 3 * (_projection_flops(model) + attention)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a device; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def attention_flops(config: Any, sequence_length: int) -> float | None:
    """Forward operations a token of everything that multiplies activations with each other."""
    if isinstance(config, DRTConfig):
        return _drt_attention(config, sequence_length)
    if isinstance(config, WindowConfig):
        keys = _mean_keys(sequence_length, config.sliding_window)
    elif isinstance(config, FullAttentionConfig):
        keys = _mean_keys(sequence_length, sequence_length)
    else:
        return None
    return 4 * config.num_hidden_layers * config.hidden_size * keys


def _projection_flops(model: PreTrainedModel) -> float:
    """Forward operations a token of the weight matrices."""
    per_token = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            once = name.rpartition(".")[2] in _ONCE_A_TOKEN
            per_token += (
                2 * module.in_features * module.out_features * (1 if once else _positions(model.config))
            )
    return per_token


def _positions(config: Any) -> float:
    """Positions a token: a DRT's chunk has one more, its landmark."""
    return (config.chunk_size + 1) / config.chunk_size if isinstance(config, DRTConfig) else 1.0


def _mean_keys(positions: float, window: int) -> float:
    """Keys that a position sees on average: all up to itself, at most `window`."""
    if positions <= window:
        return (positions + 1) / 2
    return window - window * (window - 1) / (2 * positions)


def _drt_attention(config: DRTConfig, length: int) -> float:
    """Window, encoder, retrieved chunks and landmark scores."""
    ratio, width = _positions(config), config.hidden_size
    window = 4 * config.num_hidden_layers * width * ratio * _mean_keys(length * ratio, config.sliding_window)
    if not config.retrieval:
        return window
    size, chunks = config.chunk_size, length / config.chunk_size
    read = min(config.retrieval_top_k, chunks / 2) * size  # fewer where there are fewer before
    encoder = 4 * config.num_encoder_layers * width * ratio * (size + 1)
    cross = 4 * config.num_upper_layers * width * ratio * read
    scores = 2 * config.num_groups * width * chunks / 2 / size
    return window + encoder + cross + scores
