"""Where a model takes its inputs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs.

    It is ``model.device``, which is "meta" though where accelerate offloads the weights: they come for the time of a
    module's call, to the device that accelerate has noted.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)
