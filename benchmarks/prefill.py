"""How fast a DRT model reads, beside the floor that its own matrix products set on this machine.

    python benchmarks/prefill.py --lengths 16K,64K,256K,1M --json prefill.jsonl
    python benchmarks/prefill.py --lengths 64K --profile

For each length, in a process of its own: tokens/s of prefill, seconds a token of decoding after it, peak memory.
The floor is the time of the model's matrix products (`drt.models.cost`, counted from the configuration), each at the
rate that a product of just its shape and dtype reaches here when it is run alone; "of floor" is floor time / time.
Products are those that are run: of the upper decoder, and of retrieval, only the end of the text (`read_text`).
"whole" are the FLOPs of the full model, upper decoder and retrieval over everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from drt.data.needles import parse_length
from drt.errors import DRTError
from drt.eval.results import format_length
from drt.machine import clock, keep_freed_memory, peak_rss_bytes, processor_name
from drt.models.cost import MatrixProduct, prefill_products
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.loading import load_model, shipped_checkpoint
from drt.models.reading import read_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GEMM_SECONDS = 0.3  # each rate is the best run within this time
ONCE = ("upper", "chunks ", "head", "landmark")  # products that only the end of a text runs


@dataclass(frozen=True)
class Options:
    """What a worker process needs to know."""

    checkpoint: str | None
    dtype: str
    device: str
    segment_size: int
    decode_tokens: int
    threads: int


def main() -> int:
    """Measure, show, write."""
    arguments = parse_arguments()
    console = Console()
    try:
        lengths = sorted(parse_length(length) for length in arguments.lengths.split(","))
        options = Options(
            arguments.checkpoint,
            arguments.dtype,
            arguments.device,
            parse_length(arguments.segment_size),
            arguments.decode_tokens,
            arguments.threads,
        )
        model = prepare(options)
        with open(arguments.json or os.devnull, "w", encoding="utf-8") as output:
            if arguments.profile:
                profile_prefill(model, lengths[-1], options, console)
            else:
                measure_all(model, lengths, options, console, output)
    except (DRTError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="model to measure (default: the one that ships)")
    parser.add_argument(
        "--lengths", default="16K,64K,256K,1M", help="prompt lengths in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--segment-size", default="4K", help="tokens of one forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=128, help="tokens to decode (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write JSON lines there")
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, at the longest of the lengths"
    )
    return parser.parse_args()


def prepare(options: Options) -> DRTForCausalLM:
    """Set up this process and load the model."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `drt` does
    model, _ = load_model(options.checkpoint or shipped_checkpoint(), dtype=DTYPES[options.dtype])
    if not isinstance(model, DRTForCausalLM):
        raise DRTError(f"{options.checkpoint}: expected a DRT model, got {type(model).__name__}")
    return model.to(options.device).eval()


def measure_all(
    model: DRTForCausalLM, lengths: list[int], options: Options, console: Console, output: TextIO
) -> None:
    """Machine, matrix products, then each length; every line is written as soon as it is known."""

    def write(kind: str, values: dict[str, Any]) -> None:
        output.write(json.dumps({"kind": kind, **values}) + "\n")
        output.flush()

    machine = describe_machine(options)
    write("machine", machine)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    rates = measure_rates(model.config, options, console)
    for row in rates:
        write("matrix_product", row)
    show_rates(rates, options, console)

    results = []
    context = multiprocessing.get_context("spawn")
    for length in lengths:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result = pool.submit(measure_length, options, length).result()
        result |= compare_with_floor(model.config, rates, length, result["tokens_per_second"], options)
        write("prefill", result)
        results.append(result)
        console.print(
            f"{format_length(length)}: {result['tokens_per_second']:,.0f} tokens/s", highlight=False
        )
    show_results(results, console)


def describe_machine(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(options.device)
        if options.device.startswith("cuda")
        else options.device,
        "dtype": options.dtype,
        "segment_size": options.segment_size,
    }


@torch.no_grad()
def measure_length(options: Options, length: int) -> dict[str, Any]:
    """Read a random prompt, then decode; runs in a process of its own."""
    model = prepare(options)
    device = model.device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(device)
    read(model, prompt[:, : min(length, 2 * options.segment_size)], options.segment_size)  # warm up
    start = clock(device)
    cache, token = read(model, prompt, options.segment_size)
    read_seconds = clock(device) - start
    start = clock(device)
    for _ in range(options.decode_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    decode_seconds = clock(device) - start
    return {
        "length": length,
        "tokens_per_second": length / read_seconds,
        "prefill_seconds": read_seconds,
        "decode_seconds_per_token": decode_seconds / options.decode_tokens,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def read(model: DRTForCausalLM, prompt: torch.Tensor, segment_size: int) -> tuple[Any, torch.Tensor]:
    """Prefill in segments; the cache and the token that comes next, (1, 1)."""
    cache = read_text(model, prompt[:, :-1], segment_size)
    output = model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
    return cache, output.logits[:, -1:].argmax(-1)


def measure_rates(config: DRTConfig, options: Options, console: Console) -> list[dict[str, Any]]:
    """The rate of each of the model's matrix products alone, and of a large square one, in both dtypes."""
    square = MatrixProduct("2048 x 2048 x 2048", "reference", 1, 1, 2048, 2048, 2048)
    # One page of landmarks stands for all: scores are computed in blocks, whatever the length.
    products = [*prefill_products(config, options.segment_size, 4096 * config.chunk_size), square]
    rows = []
    with console.status("measuring matrix products"):
        for product in products:
            rates = {name: gemm_rate(product, dtype, options.device) for name, dtype in DTYPES.items()}
            rows.append({"name": product.name, "part": product.part, "flops": product.flops, "rates": rates})
    return rows


@torch.no_grad()
def gemm_rate(product: MatrixProduct, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the product's shape, sizes rounded: the best run of as many as fit GEMM_SECONDS, three at least."""
    matrices, rows, inner, columns = (
        max(round(size), 1) for size in (product.matrices, product.rows, product.inner, product.columns)
    )
    left = torch.randn(matrices, rows, inner, dtype=dtype, device=device)
    right = torch.randn(matrices, inner, columns, dtype=dtype, device=device)
    if matrices == 1:
        left, right = left[0], right[0]
    best, runs, start = float("inf"), 0, clock(left.device)
    while runs < 3 or clock(left.device) - start < GEMM_SECONDS:
        begin = clock(left.device)
        torch.matmul(left, right)
        best = min(best, clock(left.device) - begin)
        runs += 1
    return 2 * matrices * rows * inner * columns / best


def compare_with_floor(
    config: DRTConfig, rates: list[dict[str, Any]], length: int, tokens_per_second: float, options: Options
) -> dict[str, float]:
    """FLOPs a token and what share of the floor's speed was reached.

    Chunks are scored at the end of the text, against all of it; in a pass that wants every logit, on the way, against
    half of it taken over all passes.
    """
    segment_size = min(options.segment_size, length)
    products = prefill_products(config, segment_size, length)
    rate = {row["name"]: row["rates"][options.dtype] for row in rates}
    tokens = {x.name: length if x.name.startswith(ONCE) else segment_size for x in products}
    retrieval = sum(x.flops / tokens[x.name] for x in products if x.part == "retrieval")
    whole = sum(product.flops for product in prefill_products(config, segment_size, length / 2, whole=True))
    floor_seconds = sum(product.flops / rate[product.name] / tokens[product.name] for product in products)
    return {
        "flops_per_token": sum(x.flops / tokens[x.name] for x in products) - retrieval,
        "retrieval_flops_per_token": retrieval,
        "whole_flops_per_token": whole / segment_size,
        "floor_tokens_per_second": 1 / floor_seconds,
        "of_floor": tokens_per_second * floor_seconds,
    }


def show_rates(rates: list[dict[str, Any]], options: Options, console: Console) -> None:
    """Each product: FLOPs a token, measured rates, floor time a token."""
    table = Table(title=f"matrix products of a segment of {format_length(options.segment_size)} tokens")
    table.add_column("product")
    for name in ("kFLOP/token", "GFLOP/s float32", "GFLOP/s bfloat16", f"floor ns/token, {options.dtype}"):
        table.add_column(name, justify="right")
    for row in rates:
        per_token = row["flops"] / options.segment_size
        floor = 1e9 * per_token / row["rates"][options.dtype]
        own = ["", ""] if row["part"] == "reference" else [f"{per_token / 1e3:,.1f}", f"{floor:,.0f}"]
        speeds = [f"{row['rates'][name] / 1e9:,.1f}" for name in DTYPES]
        table.add_row(row["name"], own[0], *speeds, own[1])
    console.print(table)


def show_results(results: list[dict[str, Any]], console: Console) -> None:
    """One row a length."""
    table = Table(title="prefill")
    columns = (
        "length",
        "tokens/s",
        "seconds",
        "decode ms/token",
        "peak RSS MB",
        "kFLOP/token",
        "+ retrieval",
        "whole",
        "floor tokens/s",
        "of floor",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            format_length(result["length"]),
            f"{result['tokens_per_second']:,.0f}",
            f"{result['prefill_seconds']:.1f}",
            f"{1e3 * result['decode_seconds_per_token']:.2f}",
            f"{result['peak_rss_bytes'] / 1e6:,.0f}",
            f"{result['flops_per_token'] / 1e3:,.0f}",
            f"{result['retrieval_flops_per_token'] / 1e3:,.0f}",
            f"{result['whole_flops_per_token'] / 1e3:,.0f}",
            f"{result['floor_tokens_per_second']:,.0f}",
            f"{result['of_floor']:.0%}",
        )
    console.print(table)


@torch.no_grad()
def profile_prefill(model: DRTForCausalLM, length: int, options: Options, console: Console) -> None:
    """Read all but the last segment, then show where the time of the last one goes: by operator and by module."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(model.device)
    last = min(options.segment_size, length - 1)
    cache = model.make_cache()
    for segment in prompt[:, :-last].split(options.segment_size, dim=1):
        model.model.remember(segment, cache)
    mark_modules(model)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        model.model.remember(prompt[:, -last:], cache)
    averages = profiled.key_averages()
    console.print(f"the last {last} of {length} tokens, by operator", highlight=False)
    print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    table = Table(title="by module (a module's time includes the modules inside it)")
    for name in ("module", "calls", "ms", "us/token"):
        table.add_column(name, justify="left" if name == "module" else "right")
    modules = [event for event in averages if event.key.startswith("module ")]
    for event in sorted(modules, key=lambda event: -event.cpu_time_total):
        milliseconds = event.cpu_time_total / 1e3
        table.add_row(
            event.key[7:], str(event.count), f"{milliseconds:.1f}", f"{1e3 * milliseconds / last:.2f}"
        )
    console.print(table)


def mark_modules(model: torch.nn.Module) -> None:
    """Give every module a range in the profile, by class."""
    for module in model.modules():
        ranges: list[record_function] = []

        def enter(module: torch.nn.Module, _: Any, ranges: list[record_function] = ranges) -> None:
            ranges.append(record_function(f"module {type(module).__name__}"))
            ranges[-1].__enter__()

        def leave(
            module: torch.nn.Module, _: Any, output: Any, ranges: list[record_function] = ranges
        ) -> None:
            ranges.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


if __name__ == "__main__":
    sys.exit(main())
