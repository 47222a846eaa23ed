"""What a process costs, a clock that waits for the device, memory that need not be paged in twice, and Ctrl-C."""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_NEW_TOKENS = 2**30  # that are generated: more is a slip of the keyboard
MOST_THREADS = 1024  # that PyTorch is asked for: with very many OpenMP ends the process
LARGEST_KEPT = 1 << 25  # glibc takes no larger M_MMAP_THRESHOLD


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
        import torch

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


def keep_freed_memory(most: int = 1 << 27) -> bool:
    """Have the C library keep memory that tensors free, for those that come next.

    By default glibc gives much of it back to the system at once, so a layer's results are paged in and zeroed again and
    again: when a text is read on a CPU that was a quarter of the time. Blocks of more than 32 MB still go back. The
    choice is one for the whole process, so programs make it, not libraries.

    Args:
        most: bytes of free memory to keep at the end of the heap.

    Returns:
        Whether the C library could be told: only glibc can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, most))


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Let a block come to its end before Ctrl-C interrupts; a second Ctrl-C interrupts it at once.

    Nothing changes outside the main thread, which alone is interrupted, and where a program handles Ctrl-C itself.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; after the block, if once.
    """
    default = signal.default_int_handler
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) != default
    ):
        yield
        return
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, default)

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if requested:
        raise KeyboardInterrupt
