"""Kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture
def pass_in_the_interpreter() -> Callable[[Path], None]:
    """Runs a test file in Triton's interpreter; fails with its output.

    In a process of its own: whether Triton interprets is settled when it is imported.
    """
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")

    def run(tests: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)],
            env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    return run
