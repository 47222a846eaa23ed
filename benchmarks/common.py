"""What the CPU benchmarks share: options, interleaved timing, memory, records, tables and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler import profile

from drt.data.needles import parse_length
from drt.errors import DRTError
from drt.eval.results import format_length
from drt.machine import keep_freed_memory, processor_name
from drt.plotting.style import length_axis, line_style, tidy


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines there, as they come")
    result.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture there")
    result.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    result.add_argument("--repeats", type=int, default=5, help="rounds of timing (default: %(default)s)")
    return result


def lengths(text: str) -> list[int]:
    """``16K,64K`` to numbers of tokens, as a type of argparse."""
    try:
        return sorted(parse_length(part) for part in text.split(","))
    except DRTError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Report:
    """Records of one benchmark: kept in a file as they come, then shown as a table and drawn."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        keep_freed_memory()  # as `drt` does
        self.name, self.options = name, options
        self.records: list[dict[str, Any]] = []
        self.console = Console()
        self.file = open(options.json or os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (as long as the report)
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": processor_name(),
            "cpu_count": os.cpu_count(),
            "threads": options.threads,
            "clock": "wall" if options.threads > 1 else "CPU time",
        }
        self._write({"kind": "machine", **machine})
        self.console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)

    def add(self, **record: Any) -> None:
        """Keep a record."""
        self.records.append(record)
        self._write({"kind": self.name, **record})
        self.console.print(
            ", ".join(f"{key} {_cell(key, value)}" for key, value in record.items()), highlight=False
        )

    def finish(self, x: str, series: str, panels: Mapping[str, str]) -> None:
        """Show the table; draw a line for each value of `series`, a panel for each (field: title)."""
        table = Table(title=self.name)
        columns = list(dict.fromkeys(key for record in self.records for key in record))
        for column in columns:
            table.add_column(column, justify="right", overflow="fold")
        for record in self.records:
            table.add_row(*(_cell(column, record.get(column)) for column in columns))
        self.console.print(table)
        self.file.close()
        if self.options.plot:
            draw(self.records, x, series, panels).savefig(self.options.plot, dpi=150)

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def draw(records: Sequence[dict[str, Any]], x: str, series: str, panels: Mapping[str, str]) -> Figure:
    """Lines over a length, both axes logarithmic."""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    names = list(dict.fromkeys(record[series] for record in records))
    for axes, (field, title) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, name in enumerate(names):
            points = [(r[x], r[field]) for r in records if r[series] == name and r.get(field) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, markersize=4, **line_style(number))
        length_axis(axes, [record[x] for record in records])
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens", fontsize=9)
        tidy(axes)
    figure.axes[0].legend(fontsize=8)
    return figure


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return format_length(value) if key == "length" else f"{value:,}"
    return "" if value is None else str(value)


def now() -> float:
    """Seconds: of CPU time for one thread, so that the work of others on the machine hardly counts; else the wall's."""
    return time.perf_counter() if torch.get_num_threads() > 1 else time.process_time()


def seconds(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each function. They take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = now()
            function()
            if turn:  # the first warms up
                times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory that tensors made by a call hold at a time, in bytes, beyond what was held before it."""
    with profile(use_kineto=True, profile_memory=True) as recorded:
        function()
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
