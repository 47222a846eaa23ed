"""What a run will take, said before anything is spent: parameters, operations, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, PreTrainedModel

from drt.models.cost import training_flops
from drt.train.config import RetrievalConfig, RowsConfig, RunConfig, TrainConfig
from drt.train.models import make_model_config

# Weights, gradients and the two moments of AdamW, all float32, also with automatic mixed precision.
_BYTES_A_PARAMETER = 16
_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        parameters: of the model; tied ones count once.
        embedding_parameters: those of them in the token embedding.
        tokens: of the whole run, at most: rows may be shorter than their limit, and a stage's rows seldom fill a step.
        flops_per_token: forward and backward.
        state_bytes: weights, gradients and optimizer, over all processes that share them.
        activation_bytes: what the backward pass needs of one forward pass, measured on a short row and scaled up.
        rows_per_pass, row_length: of that pass.
    """

    parameters: int
    embedding_parameters: int
    tokens: int
    flops_per_token: float
    state_bytes: int
    activation_bytes: int
    rows_per_pass: int
    row_length: int

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens


def estimate_run(config: RunConfig, processes: int = 1) -> Estimate:
    """Estimate one run: the model is built and run forward on a few hundred tokens without any numbers in it.

    Args:
        config: the run; where it has a curriculum, its last stage.
        processes: that share the rows of a step.

    Raises:
        DRTError: as `make_model_config`; the rows cannot be shared evenly.
    """
    if isinstance(config, RowsConfig):
        length = config.sequence_length
        rows = config.rows_per_step // processes // config.passes_per_step(processes)
    elif isinstance(config, RetrievalConfig):
        length = config.curriculum[-1].row_length
        rows = config.tokens_per_step // length // processes
    else:
        assert isinstance(config, TrainConfig)
        length = config.row_length(config.curriculum[-1])
        rows = config.tokens_per_step // length
    model = _model_of_shapes(config)
    probe = min(length, _PROBE_TOKENS)
    kept = saved_bytes(model, probe, labels=isinstance(config, RowsConfig)) / probe
    if config.gradient_checkpointing:
        layers = model.config.num_hidden_layers
        kept = (
            layers * 4 * model.config.hidden_size + kept / layers
        )  # the layers' inputs, and one layer at a time
    if config.dtype == "bfloat16":
        kept /= 2  # measured in float32
    return Estimate(
        parameters=model.num_parameters(),
        embedding_parameters=sum(weight.numel() for weight in model.get_input_embeddings().parameters()),
        tokens=config.tokens_per_step * config.max_steps,
        flops_per_token=training_flops(model.config, length),
        state_bytes=_BYTES_A_PARAMETER * model.num_parameters(),
        activation_bytes=round(kept * length * rows),
        rows_per_pass=rows,
        row_length=length,
    )


def _model_of_shapes(config: RunConfig) -> PreTrainedModel:
    """The run's model, whose tensors have shapes and a device but no numbers, so that its size costs nothing."""
    model_config = make_model_config(config)
    if (
        getattr(model_config, "retriever", None) == "embedding"
    ):  # wants its embedder, and keeps no more than another
        model_config.retriever = "random"
    with FakeTensorMode(allow_non_fake_inputs=True):
        return AutoModelForCausalLM.from_config(model_config)


def saved_bytes(model: PreTrainedModel, length: int, labels: bool) -> int:
    """Bytes that autograd keeps of a forward pass over one row in float32, the weights left out.

    Args:
        model: on the CPU.
        length: tokens of the row.
        labels: whether the model makes the loss, and so no logits.
    """
    head = model.get_output_embeddings().weight.shape
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The loss keeps the head's gradient, which is no larger for a longer row.
        if (key := StorageWeakRef(storage)) not in weights and tensor.shape != head:
            kept[key] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, length, dtype=torch.int64)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits: Tensor | None = model(input_ids=ids, labels=ids if labels else None, use_cache=False).logits
    of_loss = 0 if logits is None else logits.numel() * logits.element_size()  # it keeps as much again
    return sum(kept.values()) + of_loss
