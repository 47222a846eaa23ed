"""The host tier beside a GPU: what travels when, by structure; and on a GPU, what arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from drt.memory import DeviceStore, HostStore
from drt.memory.host_store import HostPage


def offer(rows: int, chunks: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Keys, values, landmarks, lengths and new counts."""
    keys, values = torch.randn(2, rows, chunks, 3, 2, 4, device=device)
    landmarks = torch.randn(rows, chunks, 5, device=device)
    lengths = torch.full((rows, chunks), 3, device=device)
    return keys, values, landmarks, lengths, torch.full((rows,), chunks)


class Transfer:
    """Stands for the copies of a GPU: what was sent arrives when it is waited for."""

    def __init__(self) -> None:
        self.waits = self.sent = self.arrived = 0

    def to_host(self, tensors: tuple[Tensor, ...]) -> Any:
        class Arrival:
            def wait(arrival) -> tuple[Tensor, ...]:
                self.waits += 1
                return tensors

        return Arrival()

    def to_device(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        self.sent += 1

        def arrive() -> tuple[Tensor, ...]:
            self.arrived += 1
            return tensors

        return arrive


@pytest.fixture
def page() -> HostPage:
    *fields, landmarks, lengths, _ = offer(2, 0)
    return HostPage.room((*fields, lengths), landmarks, 4, Transfer())  # type: ignore[arg-type]


def write(page: HostPage, slot: int) -> tuple[Tensor, ...]:
    keys, values, landmarks, lengths, _ = offer(1, 1)
    fields = tuple(x[0] for x in (keys, values, lengths))
    page.write(torch.tensor([1]), torch.tensor([slot]), fields, landmarks[0])
    assert torch.equal(page.landmarks(slot, slot + 1)[1], landmarks[0]), "landmarks are there at once"
    return fields


def test_chunks_are_waited_for_when_they_are_read(page: HostPage) -> None:
    transfer = page._transfer
    first = write(page, 0)
    assert transfer.waits == 0
    second = write(page, 2)
    assert transfer.waits == 1, "one copy is under way at a time"
    read = page.read(torch.tensor([1, 1]), torch.tensor([0, 2]))
    assert transfer.waits == 2
    for got, *wanted in zip(read, first, second, strict=True):
        assert torch.equal(got, torch.cat(wanted))
    page.read(torch.tensor([1]), torch.tensor([0]))
    assert transfer.waits == 2, "what has arrived is not waited for again"


def test_a_copied_page_has_what_was_under_way(page: HostPage) -> None:
    fields = write(page, 3)
    copied = page.copy(torch.tensor([1, 1, 0]))
    for row in (0, 1):
        for got, wanted in zip(copied.read(torch.tensor([row]), torch.tensor([3])), fields, strict=True):
            assert torch.equal(got, wanted)
    assert torch.equal(copied.landmarks(3, 4)[0], page.landmarks(3, 4)[1])


def test_what_is_prefetched_is_sent_at_once_and_waited_for_when_it_is_wanted() -> None:
    store, plain = HostStore(dtype="int8", page_size=2), HostStore(dtype="int8", page_size=2)
    store._transfer = transfer = Transfer()  # type: ignore[assignment]
    new = offer(2, 5)
    for one in (store, plain):
        one.append(*new)
    indices = torch.tensor([[[4, 0, -1]], [[1, 3, 2]]])
    arrive = store.prefetch(indices)
    assert (transfer.sent, transfer.arrived) == (1, 0)
    for got, wanted in zip(arrive(), plain.gather(indices), strict=True):
        assert torch.equal(got, wanted)
    assert (transfer.sent, transfer.arrived) == (1, 1)
    store.gather(indices)
    assert (transfer.sent, transfer.arrived) == (2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_gpu_reads_from_the_host_what_it_would_hold_itself(dtype: str) -> None:
    device, host = DeviceStore(page_size=8, dtype=dtype), HostStore(page_size=8, dtype=dtype)
    rows = 2
    for step in range(12):
        new = offer(rows, 3, "cuda")
        for store in (device, host):
            store.append(*new)
        if step % 4 == 3:
            for store in (device, host):
                store.select_rows(torch.tensor([1, 0, 0], device="cuda"))
            rows = 3
        indices = torch.randint(-1, int(device.counts.min()), (rows, 4, 3), device="cuda")
        for got, wanted in zip(host.gather(indices), device.gather(indices), strict=True):
            assert got.is_cuda
            assert torch.equal(got, wanted)
        for got, wanted in zip(host.landmark_blocks(), device.landmark_blocks(), strict=True):
            assert got.is_cuda
            assert torch.equal(got, wanted)
    assert host._transfer is not None
    assert all(x.is_pinned() for x in host._transfer.to_host(new[:2]).tensors), "buffers of copies are pinned"
