"""Kernels are launched on the current device, whatever device their tensors lie on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def on_its_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run a function with the device of its first argument, a tensor, as the current one."""

    @wraps(function)
    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Result:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return run
