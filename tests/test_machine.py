"""What the machine tells about a process."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from drt import machine

MEGABYTE = 10**6


def printed_by(code: str) -> list[int]:
    """The numbers that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return [int(word) for word in done.stdout.split()]


def test_peak_memory_grows_with_what_is_held_and_stays() -> None:
    code = (
        "from drt.machine import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "held = b'x' * 200_000_000\n"
        "during = peak_rss_bytes()\n"
        "del held\n"
        "print(before, during, peak_rss_bytes())\n"
    )
    before, during, after = printed_by(code)
    assert 180 * MEGABYTE < during - before < 260 * MEGABYTE
    assert abs(after - during) < 20 * MEGABYTE  # the kernel counts pages a little late


def test_without_proc_the_operating_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = machine.peak_rss_bytes()
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "nothing")
    assert 0.5 * expected < machine.peak_rss_bytes() < 10 * expected  # getrusage may count the parent's peak
    assert machine.processor_name()


def test_the_clock_counts_seconds() -> None:
    start = machine.clock(torch.device("cpu"))
    time.sleep(0.02)
    assert 0.02 <= machine.clock(torch.device("cpu")) - start < 5


def test_the_processor_has_a_name() -> None:
    name = machine.processor_name()
    assert name
    assert "\n" not in name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_when_wanted(kept: bool) -> None:
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from drt.machine import keep_freed_memory\n"
        f"assert not {kept} or keep_freed_memory()\n"
        "def resident():\n"
        "    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "tensor = torch.ones(6_000_000)\n"
        "held = resident()\n"
        "del tensor\n"
        "print(held - resident())\n"
    )
    (given_back,) = printed_by(code)
    assert given_back < MEGABYTE if kept else given_back > 20 * MEGABYTE


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    assert not machine.keep_freed_memory()


def test_ctrl_c_waits_for_the_end_of_a_block_and_twice_does_not() -> None:
    done = []

    def press(times: int) -> None:
        with machine.hold_interrupt():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            done.append(times)

    press(0)
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            press(times)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == [0, 1]


def test_a_program_that_handles_ctrl_c_itself_is_left_alone() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with machine.hold_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    with ThreadPoolExecutor(1) as pool, machine.hold_interrupt():
        assert pool.submit(lambda: machine.hold_interrupt().__enter__()).result() is None
