"""What the GPU benchmarks share: timing, ceilings of the machine, records that a cut run keeps, tables."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BYTES = 2**30  # of the copy that measures the bandwidth
GEMM_SIZE = 8192


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    result.add_argument("--output", type=Path, help="folder for NAME.jsonl, one record a line as it comes")
    result.add_argument("--budget", type=float, default=120.0, help="seconds after which no case is begun")
    result.add_argument("--tiny", action="store_true", help="sizes that a CPU can try")
    return result


class Report:
    """Runs cases one after the other; one that fails, or comes too late, is recorded and stops nothing."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.device = torch.device(options.device)
        self.end = time.monotonic() + options.budget
        self.records: list[dict[str, Any]] = []
        self.path = None if options.output is None else options.output / f"{name}.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def case(self, labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure one case; `labels` say which it is."""
        if time.monotonic() > self.end:
            return self.add({**labels, "failed": "out of time"})
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001  (whatever one case dies of, the others are wanted)
            place = traceback.extract_tb(error.__traceback__)[-1]
            found = {
                "failed": f"{type(error).__name__}: {error}"[:500],
                "at": f"{place.filename}:{place.lineno}",
            }
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.add({**labels, **found})

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record, on disk at once."""
        machine = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor()
        record = {"benchmark": self.name, **record, "machine": machine, "torch": torch.__version__}
        self.records.append(record)
        print(json.dumps(record), flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def show(self, columns: Sequence[str]) -> None:
        """A table of all records; what failed says so."""
        table = Table(title=self.name)
        for column in (*columns, "failed"):
            table.add_column(column)
        for record in self.records:
            table.add_row(
                *(_cell(record.get(column, "")) for column in columns), record.get("failed", "")[:40]
            )
        Console(width=150).print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(function: Callable[[], Any], device: torch.device, *, at_least: float = 0.2) -> float:
    """Median time of a call: two to warm up, then 3 to 50 of them, as many as fill `at_least` seconds."""
    for _ in range(2):
        function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < 50):
        times.append(_once(function, device))
    return statistics.median(times)


def _once(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_mebibytes(function: Callable[[], Any], device: torch.device) -> float | None:
    """Device memory that a call takes above what was held before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """What the machine reaches now: bytes/s of a large copy (read and written), FLOP/s of a bfloat16 product."""
    elements = (2**20 if tiny else BYTES) // 2
    source = torch.randn(elements, device=device).bfloat16()
    target = torch.empty_like(source)
    bandwidth = 4 * elements / seconds(lambda: target.copy_(source), device)
    size = 256 if tiny else GEMM_SIZE
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return {"bytes_per_s": bandwidth, "flops_per_s": 2 * size**3 / seconds(lambda: left @ right, device)}
