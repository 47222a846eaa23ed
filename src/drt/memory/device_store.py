"""The ``device`` tier: chunks in pages on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.memory.chunk_codec import Fields
from drt.memory.paged_store import Page, PagedStore
from drt.memory.tensor_page import TensorPage


class DeviceStore(PagedStore):
    """Pages of chunks on the device of what is appended.

    Args:
        page_size: chunks in a page; ``None`` takes as many as fill 32 MiB, and at least 64 and those of the first
            append.
        dtype: "float32", "bfloat16", "float16" or "int8"; ``None`` holds what comes, unchanged: a text that is read
            to be continued at once gives the logits of one pass over all of it.
    """

    def __init__(self, page_size: int | None = None, dtype: str | None = None) -> None:
        super().__init__(dtype, page_size)

    def _new_page(self, fields: Fields, landmarks: Tensor) -> Page:
        return TensorPage.like(fields, landmarks, self._page_size)

    def _index_device(self, chunk_indices: Tensor) -> torch.device:
        return self._pages[0].page.landmarks(0, 0).device
