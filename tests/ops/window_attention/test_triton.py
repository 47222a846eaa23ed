"""The Triton kernels on a machine without a GPU, in the interpreter; FlexAttention as far as a CPU runs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from drt.ops.window_attention import alibi_slopes, window_attention
from drt.testing.window_attention import CASES, Case, make_inputs

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_kernels_in_the_interpreter(pass_in_the_interpreter: Callable[[Path], None]) -> None:
    pass_in_the_interpreter(Path(__file__).parent / "interpreted_triton.py")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused() -> None:
    query, key, value, _ = make_inputs(Case(), torch.float32)
    with pytest.raises(ValueError, match="needs CUDA tensors; got tensors on cpu"):
        window_attention(query, key, value, window=3, impl="triton")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [*CASES, Case(length=300, past=70, window=140)], ids=str)
def test_flex_attention_is_the_dense_equations(case: Case) -> None:
    query, key, value, _ = make_inputs(case, torch.float32)
    start = None if case.start is None else torch.tensor(case.start)
    slopes = alibi_slopes(case.heads) if case.alibi else None
    results = [
        window_attention(
            query, key, value, window=case.window, key_start=start, alibi_slopes=slopes, impl=impl
        )
        for impl in ("flex", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
