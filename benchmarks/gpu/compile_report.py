"""What the Triton kernels cost a Hopper GPU, read off their machine code; no GPU is needed.

    python benchmarks/gpu/compile_report.py
    python benchmarks/gpu/compile_report.py --quick

The operation is called as a model calls it, but every launch is recorded instead of run, then compiled for sm_90
with the very arguments of the launch. For each: registers a thread, bytes spilled, shared memory a block, matrix
instructions (wgmma). A spill or more shared memory than a multiprocessor has makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from drt.ops.grouped_cross_attention.impl import triton as implementation
from drt.testing.grouped_cross_attention import Case, make_inputs

# The package's functions have the names of their modules, so plain attribute access would give those.
forward, decode, backward = (
    import_module(f"{implementation.__name__}.{name}") for name in ("forward", "decode", "backward")
)

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
KERNELS = {
    "forward": forward.forward_kernel,
    "decode": decode.decode_kernel,
    "query gradient": backward.query_kernel,
    "chunk gradient": backward.chunk_kernel,
}
PARTS = backward.parts_kernel
POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
PAPER = Case(
    batch=1, blocks=16, block_size=64, heads=12, kv_heads=12, dim=64, size=63, slots=8, chunks=16, sink=True
)


@dataclass(frozen=True)
class Shape:
    """A configuration of the report."""

    name: str
    case: Case
    dtype: torch.dtype


def shapes(quick: bool) -> Iterator[Shape]:
    """The paper's shape first, then every width of head and precision, grouped heads, and one query a selection."""
    yield Shape("paper", PAPER, torch.bfloat16)
    if quick:
        return
    changes: dict[str, dict[str, int]] = {
        "4 heads share": {"kv_heads": 3},
        "block of 1": {"block_size": 1, "blocks": 256},
        "D 16": {"dim": 16},
        "D 32": {"dim": 32},
        "D 80": {"dim": 80},
        "D 128": {"dim": 128},
        "D 256": {"dim": 256},
        "S 256": {"size": 256},
    }
    for name, change in changes.items():
        yield Shape(name, Case(**{**vars(PAPER), **change}), torch.bfloat16)
    yield Shape("float16", PAPER, torch.float16)
    for dim in (64, 128, 256):
        yield Shape(f"float32, D {dim}", Case(**{**vars(PAPER), "dim": dim}), torch.float32)


class Recorder:
    """Stands where a kernel is launched and keeps the arguments."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)

        return launch


def record(shape: Shape) -> dict[str, dict[str, Any]]:
    """The launch arguments of each kernel, by the names in KERNELS."""
    inputs = make_inputs(shape.case, shape.dtype)
    query, keys, values, indices, weights, lengths, grad_output = inputs
    arguments = (
        query,
        keys,
        values,
        indices,
        weights,
        lengths,
        shape.case.block_size,
        0.125,
        shape.case.sink,
    )
    problem = implementation.prepare(*arguments)
    recorders = {name: Recorder(kernel) for name, kernel in KERNELS.items()}
    forward.forward_kernel = recorders["forward"]
    decode.decode_kernel = recorders["decode"]
    backward.query_kernel, backward.chunk_kernel = recorders["query gradient"], recorders["chunk gradient"]
    backward.parts_kernel = Recorder(PARTS)  # a plain sum, which needs no report
    _, log_sums = forward.forward(problem)
    decode.decode(problem)
    backward.backward(problem, log_sums, grad_output)
    return {name: recorder.launches[0] for name, recorder in recorders.items()}


def source(kernel: JITFunction[Any], launch: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """What Triton would compile for such a launch, and its options."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = launch[name]
        if kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + POINTERS[value.dtype], True
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    return ASTSource(kernel, signature, constants, attributes), options


def measure(kernel: JITFunction[Any], launch: dict[str, Any]) -> dict[str, Any]:
    """Compile one launch and read the assembler's report."""
    code, options = source(kernel, launch)
    compiled = triton.compile(code, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            path,
            "-o",
            path.with_suffix(".cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    return {
        "tiles": "x".join(str(launch[name]) for name in ("BLOCK_R", "BLOCK_S", "BLOCK_D")),
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        "registers": int(registers[1]),
        "spilled_bytes": sum(map(int, spills)),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def main() -> int:
    """Compile, show, and say by the exit status whether all fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the paper's shape")
    parser.add_argument("--output", type=Path, help="also append the records to this file as JSON lines")
    options = parser.parse_args()
    rows = []
    for shape in shapes(options.quick):
        for name, launch in record(shape).items():
            found = measure(KERNELS[name], launch)
            rows.append({"shape": shape.name, "kernel": name, "triton": triton.__version__, **found})
    table = Table(title=f"sm_90, Triton {triton.__version__}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    if options.output is not None:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(any(row["spilled_bytes"] or row["shared_bytes"] > SHARED_BYTES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
