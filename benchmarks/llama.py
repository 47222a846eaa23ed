"""Reading and generating on the CPU: DRT against a Hugging Face Llama of the same size with its own cache.

    python benchmarks/llama.py --json llama.jsonl --plot llama.png

DRT has the sizes of the checkpoint that ships; Llama has its width, heads and layers, the encoder's included. Both
read random tokens with one row of logits a pass, DRT in passes of --segment-size and Llama in a single one, each the
way it is fastest, then generate. Every model and length has
a process of its own, which tells its peak memory. All of them read one after the other, then generate in turns, 16
tokens each, so that what else the machine does hits all alike; the time of a token is the median.
"""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from common import Report, lengths, now, parser
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from drt.machine import keep_freed_memory, peak_rss_bytes
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.loading import shipped_checkpoint

TOKENS = 16  # generated in one turn
state: dict[str, Any] = {}  # of a worker process: the model, its cache and the next token


def make(name: str) -> PreTrainedModel:
    """An untrained model in eval mode."""
    torch.manual_seed(0)
    drt = DRTConfig.from_pretrained(shipped_checkpoint())
    if name == "DRT":
        return DRTForCausalLM(drt).eval()
    llama = LlamaConfig(
        vocab_size=drt.vocab_size,
        hidden_size=drt.hidden_size,
        intermediate_size=drt.intermediate_size,
        num_hidden_layers=drt.num_hidden_layers + drt.num_encoder_layers,
        num_attention_heads=drt.num_attention_heads,
        num_key_value_heads=drt.num_key_value_heads,
        max_position_embeddings=2**24,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(llama).eval()


@torch.inference_mode()
def read(name: str, length: int, segment_size: int, threads: int) -> dict[str, Any]:
    """Read that many tokens; keeps the cache."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as `drt` does, for either model
    model, cache = make(name), None
    ids = torch.randint(3, model.config.vocab_size, (1, length))
    model(ids[:, : min(length, 1024)], use_cache=True, logits_to_keep=1)  # warms up
    start = now()
    for segment in ids.split(segment_size if name == "DRT" else length, 1):
        output = model(segment, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    taken = now() - start
    state.update(model=model, cache=cache, token=output.logits[:, -1:].argmax(-1))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prefill_seconds": taken,
        "tokens_per_second": length / taken,
        "peak_rss_mb": peak_rss_bytes() / 1e6,
    }


@torch.inference_mode()
def generate() -> list[float]:
    """Seconds of each of a few more tokens."""
    times = []
    for _ in range(TOKENS):
        start = now()
        output = state["model"](
            state["token"], past_key_values=state["cache"], use_cache=True, logits_to_keep=1
        )
        state["token"] = output.logits[:, -1:].argmax(-1)
        times.append(now() - start)
    return times


def main() -> None:
    """Measure, show, write."""
    command = parser(__doc__)
    command.add_argument("--lengths", type=lengths, default="1K,4K,16K,64K", help="(default: %(default)s)")
    command.add_argument(
        "--more-lengths", type=lengths, default="256K,1M", help="for DRT alone (default: %(default)s)"
    )
    command.add_argument("--segment-size", type=int, default=4096, help="tokens (default: %(default)s)")
    options = command.parse_args()
    report = Report("reading and generating", options)
    cases = [(name, length) for length in options.lengths for name in ("DRT", "Llama")]
    cases += [("DRT", length) for length in options.more_lengths]
    context = multiprocessing.get_context("spawn")
    pools = {case: ProcessPoolExecutor(1, mp_context=context) for case in cases}
    found = {}
    for case, pool in pools.items():
        found[case] = pool.submit(read, *case, options.segment_size, options.threads).result()
        report.console.print(f"{case[0]} has read {case[1]:,} tokens: {found[case]['prefill_seconds']:.2f} s")
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case, pool in pools.items():
            times[case] += pool.submit(generate).result()
    for pool in pools.values():
        pool.shutdown()
    for name, length in cases:
        row = found[name, length] | {"decode_ms": 1e3 * statistics.median(times[name, length])}
        other = found.get(("Llama", length))
        ratio = other and other["prefill_seconds"] / row["prefill_seconds"]
        report.add(model=name, length=length, **row, prefill_over_llama=ratio)
    panels = {"tokens_per_second": "reading, tokens/s", "decode_ms": "ms a generated token"}
    report.finish("length", "model", panels | {"peak_rss_mb": "peak memory of the process, MB"})


if __name__ == "__main__":
    main()
