"""Prefill and decoding of one text that grows from 16K to 16M tokens, its chunk memory on the GPU or in host memory.

    python benchmarks/gpu/reading.py --output results --store host

The paper's 128M sizes in bfloat16 with random weights, two retrieval groups, one stream read in segments. At each
length: tokens/s of what was read since the last (`read_text`), ms a token of decoding, GPU memory.
"of 16K" is a token's time over its time at the first length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Report, parser

from drt.data.needles import parse_length
from drt.memory import DeviceStore, HostStore
from drt.models.drt import DRTCache, DRTConfig, DRTForCausalLM
from drt.models.reading import read_text

STORES: dict[str, Callable[[], Any]] = {"device": DeviceStore, "host": HostStore}
SEGMENT = 2**14
DECODED = 126  # two chunks


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--store", choices=sorted(STORES), default="device")
    options.add_argument(
        "--lengths", default="16K,64K,256K,1M,4M,16M", help="tokens, from 16K up, the shortest first"
    )
    arguments = options.parse_args()
    report = Report(f"reading-{arguments.store}", arguments)
    device = report.device
    lengths = [300, 900] if arguments.tiny else [parse_length(n) for n in arguments.lengths.split(",")]
    segment = 256 if arguments.tiny else SEGMENT
    if lengths != sorted(lengths) or lengths[0] < segment:
        options.error(
            f"--lengths: expected lengths from {segment} up, the shortest first, got {arguments.lengths}"
        )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} if arguments.tiny else {}
    config = DRTConfig(vocab_size=50257, num_groups=2, **sizes)
    torch.manual_seed(0)
    model = DRTForCausalLM(config).to(device, torch.bfloat16).eval()
    cache = DRTCache(config, STORES[arguments.store]())
    first: list[float] = []

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def in_time(_: int) -> None:
        if time.monotonic() > report.end:
            raise TimeoutError(f"out of time after {cache.seen_tokens} tokens")

    def read(count: int) -> None:
        tokens = torch.randint(0, config.vocab_size, (1, count), device=device)
        read_text(model, tokens, segment, cache, in_time)

    def measure(length: int) -> dict[str, Any]:
        new = length - cache.seen_tokens
        start = wait()
        read(new)
        prefill = wait() - start
        for _ in range(DECODED // 2):  # the first tokens pay for what is compiled or allocated once
            read(1)
        start = wait()
        for _ in range(DECODED):
            read(1)
        decoding = (wait() - start) / DECODED
        first.append(decoding)
        return {
            "prefill_tokens_per_s": new / prefill if new else None,
            "decode_ms": decoding * 1e3,
            "of_16k": decoding / first[0],
            "device_mib": torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else None,
        }

    with torch.inference_mode():
        read(segment)  # the first pass compiles; its text stays in front
        for length in lengths:
            report.case({"case": arguments.store, "tokens": length}, lambda n=length: measure(n))
    report.show(["case", "tokens", "prefill_tokens_per_s", "decode_ms", "of_16k", "device_mib"])


if __name__ == "__main__":
    main()
