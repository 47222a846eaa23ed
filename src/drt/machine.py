"""What a process costs: its peak memory, and a clock that waits for the device."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it began, in bytes (Linux and macOS)."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's getrusage would also count what the parent process held when it started this one.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, read once the device has done all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def processor_name() -> str:
    """Name of the CPU where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*: (.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
