"""The Triton kernels on a machine without a GPU: right in the interpreter, and compiled ahead of time for one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from drt.ops.grouped_cross_attention import grouped_cross_attention

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_kernels_in_the_interpreter(pass_in_the_interpreter: Callable[[Path], None]) -> None:
    pass_in_the_interpreter(Path(__file__).parent / "interpreted_triton.py")


@needs_triton
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled for it by the GPU tests"
)
def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    report = Path(__file__).parents[3] / "benchmarks" / "gpu" / "compile_report.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(report), "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused() -> None:
    keys = torch.zeros(1, 2, 3, 1, 16)
    indices, weights = torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="needs CUDA tensors; got tensors on cpu"):
        grouped_cross_attention(
            torch.zeros(1, 1, 1, 16), keys, keys, indices, weights, block_size=1, impl="triton"
        )
