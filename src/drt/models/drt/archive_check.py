"""Does an archive belong to a model? It may be a stranger's: what it says is compared before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypedDict, cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.memory import Archive
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.fingerprint import model_fingerprint, tokenizer_fingerprint


def check_archive(
    archive: Archive, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Make sure that an archive was made by a model and its tokenizer, and holds what this model can read.

    Raises:
        DRTError: another model or tokenizer made it, or its sizes or its decoding state do not fit the model.
    """
    archive.check(model_fingerprint(model), None if tokenizer is None else tokenizer_fingerprint(tokenizer))
    config = cast(DRTConfig, model.config)
    for name, expected in archive_sizes(config).items():
        held = getattr(archive.description, name)
        if held != expected:
            raise DRTError(f"{archive.path} does not fit the model: expected {name} {expected}, got {held}")
    for problem in _problems(archive.state(), _expected(config, archive.num_chunks), archive.num_chunks):
        raise DRTError(f"{archive.path} does not fit the model: in its decoding state, {problem}")


class ArchiveSizes(TypedDict):
    """Fields of an `ArchiveDescription` that follow from a model's configuration."""

    chunk_size: int
    num_heads: int
    head_dim: int
    landmark_size: int


def archive_sizes(config: DRTConfig) -> ArchiveSizes:
    """The sizes of a model's archives."""
    num_heads, head_dim = config.key_value_shape
    return ArchiveSizes(
        chunk_size=config.chunk_size, num_heads=num_heads, head_dim=head_dim, landmark_size=config.hidden_size
    )


class _Expected(NamedTuple):
    """A tensor of a decoding state (`DRTCache.state`).

    Attributes:
        shape: of the tensor.
        whole: its least and largest whole number; ``None``: it holds floats.
        shorter: its second dimension may be.
    """

    shape: tuple[int, ...]
    whole: tuple[int, int] | None = None
    shorter: bool = False

    def fits(self, tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        if self.shorter and len(shape) > 1:
            shape = (shape[0], max(shape[1], self.shape[1]), *shape[2:])
        if shape != self.shape or tensor.is_floating_point() != (self.whole is None):
            return False
        return (
            self.whole is None
            or not tensor.numel()
            or (self.whole[0] <= int(tensor.min()) and int(tensor.max()) <= self.whole[1])
        )


def _expected(config: DRTConfig, num_chunks: int) -> dict[str, _Expected]:
    """The tensors of a decoding state after so many chunks, by name."""
    size, top_k, heads = config.chunk_size, config.retrieval_top_k, config.key_value_shape
    tensors = {
        "open_states": _Expected((1, size, config.hidden_size)),
        "open_ids": _Expected((1, size), (0, config.vocab_size - 1)),
        "open_lengths": _Expected((1,), (0, size)),
        "closed_counts": _Expected((1,), (num_chunks, num_chunks)),
    }
    for number in range(config.num_hidden_layers):
        for part in ("keys", "values"):
            shape = (1, config.sliding_window - 1, *heads)
            tensors[f"layer.{number}.{part}"] = _Expected(shape, shorter=True)
    for group in range(config.num_groups or 0):
        for part, held in {
            "keys": _Expected((1, top_k, size, *heads)),
            "values": _Expected((1, top_k, size, *heads)),
            "lengths": _Expected((1, top_k), (0, size)),
            "chunk_indices": _Expected((1, top_k), (-1, num_chunks - 1)),
            "chunk_weights": _Expected((1, top_k)),
        }.items():
            tensors[f"selection.{group}.{part}"] = held
    return tensors


def _problems(
    state: Mapping[str, Tensor], expected: Mapping[str, _Expected], num_chunks: int
) -> Iterator[str]:
    """What in a decoding state is not as it is expected."""
    for name, tensor in state.items():
        if name not in expected:
            yield f"{name} is unknown"
        elif not expected[name].fits(tensor):
            yield f"expected {name} {expected[name]}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
    if state or num_chunks:
        yield from (
            f"{name} is missing"
            for name in ("open_states", "open_lengths", "closed_counts")
            if name not in state
        )
    for name in expected:
        owner, _, part = name.rpartition(".")
        keys, values = f"{owner}.keys", f"{owner}.values"
        if owner and part != "keys" and (keys in state) != (name in state):
            yield f"{name if keys in state else keys} is missing"
        if (
            part == "values"
            and keys in state
            and values in state
            and state[keys].shape != state[values].shape
        ):
            yield f"{keys} and {values} have different shapes"
