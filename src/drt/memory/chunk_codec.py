"""How the keys and values of a chunk are held: as they come, rounded to bfloat16, or in int8 with scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drt.errors import DRTError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
Fields = tuple[Tensor, ...]


class FieldSpec(NamedTuple):
    """One tensor of a held chunk: its shape for one chunk, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ChunkCodec:
    """Turns keys and values (..., S, h_kv, D) into the fields that a store holds, and back.

    The fields are keys, values and, for int8, scales (..., 2, h_kv) in float32: the largest magnitude of a chunk's
    keys, and of its values, in one head, divided by 127. What lies past a chunk's length is held as zeros.

    Args:
        dtype: "float32", "bfloat16", "float16" or "int8"; ``None`` holds what comes, unchanged.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: str | None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"chunks can be held as {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype = dtype

    def encode(self, keys: Tensor, values: Tensor, lengths: Tensor) -> Fields:
        """Keys and values (..., S, h_kv, D) of chunks with ``lengths`` (...) tokens as fields.

        Raises:
            DRTError: they are not finite, or beyond the range of the dtype: what was held would be infinite.
        """
        keys, values = keys.detach(), values.detach()
        if self.dtype is None:
            return keys, values
        outside = torch.arange(keys.shape[-3], device=keys.device) >= lengths.to(keys.device).unsqueeze(-1)
        if bool(outside.any()):
            keys, values = (x.masked_fill(outside[..., None, None], 0) for x in (keys, values))
        if self.dtype != "int8":
            dtype = DTYPES[self.dtype]
            return round_to(dtype, keys, "keys"), round_to(dtype, values, "values")
        keys, values = round_to(torch.float32, keys, "keys"), round_to(torch.float32, values, "values")
        (keys, key_scale), (values, value_scale) = _to_int8(keys), _to_int8(values)
        return keys, values, torch.stack([key_scale, value_scale], -2)

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Keys and values of fields, in the dtype they are held in; float32 for int8."""
        if self.dtype != "int8":
            keys, values = fields
            return keys, values
        keys, values, scales = fields
        key_scale, value_scale = scales[..., None, :, None].unbind(-4)
        return keys * key_scale, values * value_scale

    def specs(self, chunk_size: int, num_heads: int, head_dim: int) -> tuple[FieldSpec, ...]:
        """The fields of one chunk.

        Raises:
            ValueError: the codec holds what comes, so its fields are not known beforehand.
        """
        if self.dtype is None:
            raise ValueError(f"files need a dtype: one of {', '.join(DTYPES)}")
        matrix = FieldSpec((chunk_size, num_heads, head_dim), DTYPES[self.dtype])
        scales = (FieldSpec((2, num_heads), torch.float32),) if self.dtype == "int8" else ()
        return (matrix, matrix, *scales)


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(..., S, h, D) in int8 and its scales (..., h)."""
    scale = tensor.abs().amax((-3, -1)) / 127
    divisor = torch.where(scale > 0, scale, 1)[..., None, :, None]
    # The scale of magnitudes near the smallest float is rounded itself: its steps may be more than 127.
    return (tensor / divisor).round_().clamp_(-127, 127).to(torch.int8), scale


def round_to(dtype: torch.dtype, tensor: Tensor, what: str) -> Tensor:
    """A tensor in a floating dtype.

    Raises:
        DRTError: it is not finite, or not in that dtype; the message calls it ``what``.
    """
    rounded = tensor.to(dtype)
    if is_finite(rounded):
        return rounded
    name = str(dtype).removeprefix("torch.")
    if not is_finite(tensor):
        raise DRTError(
            f"expected {what} of chunks that are finite, got NaN or infinity: the model computes them"
        )
    raise DRTError(
        f"expected {what} of chunks in the range of {name}, up to {torch.finfo(dtype).max:.6g}, got "
        f"{float(tensor.abs().max()):.6g}; hold them in bfloat16 or float32"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor of any shape holds neither NaN nor infinity."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # many times as fast as isfinite().all(), and NaN is passed on
    return bool(low.isfinite() & high.isfinite())


def pack(fields: Fields) -> Tensor:
    """Fields (n, ...) of n chunks as bytes (n, record_bytes), uint8 on the CPU."""
    rows = [field.cpu().reshape(len(field), -1).contiguous().view(torch.uint8) for field in fields]
    return torch.cat(rows, 1)


def unpack(records: Tensor, specs: tuple[FieldSpec, ...]) -> Fields:
    """The reverse of `pack`."""
    parts = records.split([spec.num_bytes for spec in specs], 1)
    return tuple(
        part.contiguous().view(spec.dtype).view(-1, *spec.shape)
        for part, spec in zip(parts, specs, strict=True)
    )
