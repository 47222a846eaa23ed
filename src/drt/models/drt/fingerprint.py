"""Fingerprints of a model and of a tokenizer: what an archive was made by."""

from __future__ import annotations

import hashlib
import json

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "".join(map(chr, range(32, 127))) + "\n\té€😀 the quick brown fox 0123456789"
# What does not change what a model computes.
_IGNORED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "close_prompt",
    "dtype",
    "max_position_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, of a model's configuration and weights.

    Weights are rounded to bfloat16 first: a model and its copy in bfloat16 have the same fingerprint. A copy in float16
    has another: rounded twice, some of its weights come out otherwise.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _IGNORED}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(model.state_dict()):
        module, _, leaf = name.rpartition(".")
        with align_module_device(model.get_submodule(module)):  # an offloaded weight comes for this time
            weight = getattr(model.get_submodule(module), leaf)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            rounded = weight.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(rounded.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, of a tokenizer's vocabulary and of how it encodes a text of many kinds of characters."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(_PROBE, add_special_tokens=False)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
