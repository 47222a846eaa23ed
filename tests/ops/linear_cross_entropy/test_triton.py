"""The Triton kernel of the loss on a machine without a GPU, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_kernel_in_the_interpreter(pass_in_the_interpreter: Callable[[Path], None]) -> None:
    pass_in_the_interpreter(Path(__file__).parent / "interpreted_triton.py")
