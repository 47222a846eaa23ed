"""The ``host`` tier: chunks in the computer's own memory, landmarks on the device that searches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drt.memory.chunk_codec import Fields
from drt.memory.paged_store import Page, PagedStore
from drt.memory.tensor_page import TensorPage


class HostStore(PagedStore):
    """Pages of chunks in host memory; the buffers in which they travel to and from a GPU are pinned.

    A selection is scattered over the pages: the CPU gathers it, and what it has gathered is pinned to travel. Pinned
    pages would save no copy, and would hold tens of gigabytes that the system cannot move.

    Landmarks stay on the device of what is appended: every query scans all of them. With a GPU, chunks travel on a
    stream of their own, so that neither the host nor the kernels of the pass wait for what is not needed yet.

    Args:
        dtype: "bfloat16" (half the memory), "float32", "float16" or "int8".
        page_size: as for `DeviceStore`.
    """

    def __init__(self, dtype: str = "bfloat16", page_size: int | None = None) -> None:
        super().__init__(dtype, page_size)
        self._transfer: Transfer | None = None

    def _new_page(self, fields: Fields, landmarks: Tensor) -> Page:
        if landmarks.device.type == "cuda" and self._transfer is None:
            self._transfer = Transfer(landmarks.device)
        return HostPage.room(fields, landmarks, self._page_size, self._transfer)

    def _index_device(self, chunk_indices: Tensor) -> torch.device:
        return torch.device("cpu")

    def _deliver(self, fields: Fields, device: torch.device) -> Callable[[], Fields]:
        return (lambda: fields) if self._transfer is None else self._transfer.to_device(fields)


class HostPage(TensorPage):
    """A page whose fields lie in host memory; what was written last may still be on its way."""

    def __init__(self, fields: Fields, landmarks: Tensor, transfer: Transfer | None) -> None:
        super().__init__(fields, landmarks)
        self._transfer = transfer
        self._arriving: tuple[Tensor, Tensor, Arrival] | None = None

    @classmethod
    def room(cls, fields: Fields, landmarks: Tensor, capacity: int, transfer: Transfer | None) -> HostPage:
        """Empty slots for chunks like those given, (B, N, ...)."""
        held = tuple(
            torch.empty(field.shape[0], capacity, *field.shape[2:], dtype=field.dtype, device="cpu")
            for field in fields
        )
        return cls(held, landmarks.new_zeros(landmarks.shape[0], capacity, landmarks.shape[2]), transfer)

    def write(self, row: Tensor, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        if self._transfer is None:
            super().write(row, slot, fields, landmarks)
            return
        self._settle()
        self._arriving = row, slot, self._transfer.to_host(fields)
        device = landmarks.device
        self.stored_landmarks[row.to(device), slot.to(device)] = landmarks

    def read(self, row: Tensor, slot: Tensor) -> Fields:
        self._settle()
        return super().read(row, slot)

    def copy(self, rows: Tensor) -> HostPage:
        self._settle()
        copied = HostPage.room(
            tuple(field[rows, :0] for field in self.fields),
            self.stored_landmarks[rows.to(self.stored_landmarks.device), :0],
            self.capacity,
            self._transfer,
        )
        for target, source in zip(copied.fields, self.fields, strict=True):
            torch.index_select(source, 0, rows, out=target)
        copied.stored_landmarks.copy_(self.stored_landmarks[rows.to(self.stored_landmarks.device)])
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all of it must have arrived."""
        self._settle()
        return vars(self)

    def _settle(self) -> None:
        """Put what has arrived into its slots."""
        if self._arriving is not None:
            row, slot, arrival = self._arriving
            self._arriving = None
            for held, offer in zip(self.fields, arrival.wait(), strict=True):
                held[row, slot] = offer


class Arrival(NamedTuple):
    """Tensors in host memory that hold their values once the event has happened."""

    tensors: Fields
    event: torch.cuda.Event

    def wait(self) -> Fields:
        self.event.synchronize()
        return self.tensors


class Transfer:
    """Copies between a GPU and pinned host memory, on a stream of their own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def __reduce__(self) -> tuple[type[Transfer], tuple[torch.device]]:
        return Transfer, (self._device,)  # a copy has a stream of its own

    def to_host(self, tensors: Fields) -> Arrival:
        """Start copies to pinned memory of what the current stream has computed."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
            for target, source in zip(staged, tensors, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
        return Arrival(staged, self._stream.record_event())

    def to_device(self, tensors: Fields) -> Callable[[], Fields]:
        """Start copies of host tensors to the GPU.

        What is returned gives them, and makes the stream that is then current wait for them, never the host: what was
        queued there before runs beside the copies.
        """
        with torch.cuda.stream(self._stream):
            pinned = [x.pin_memory() for x in tensors]
            copies = tuple(x.to(self._device, non_blocking=True) for x in pinned)
        event = self._stream.record_event()

        def arrive() -> Fields:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for copy in copies:
                copy.record_stream(current)
            return copies

        return arrive
