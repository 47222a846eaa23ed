"""What every test shares: no network, the same random numbers, no GPU tests without a GPU."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when huggingface_hub is imported: a test that asks the hub must fail
)

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _heed_ctrl_c() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send themselves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
