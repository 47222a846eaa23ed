"""What a token costs on the CPU as the text before it grows, and how much of that is retrieval.

    python benchmarks/context_length.py --lengths 16K,64K,256K,1M,4M,16M --json cost.jsonl --plot cost.png

The checkpoint that ships reads random tokens once, to the longest length. At each length: the median of the last
passes, once as a text is read (nothing is retrieved before its end: the upper decoder does not run) and once with all
logits, where every chunk retrieves; the median time of a generated token; the share of the last two that scoring
landmarks and choosing takes.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import Report, lengths, now, parser
from torch import nn

from drt.machine import peak_rss_bytes
from drt.models.drt import DRTCache, DRTForCausalLM
from drt.models.loading import load_model, shipped_checkpoint

PASSES, TOKENS = 8, 32  # measured at each length


class RetrievalClock:
    """Adds up the time inside the retrievers of a model."""

    def __init__(self, model: DRTForCausalLM) -> None:
        self.seconds = self.start = 0.0
        for retriever in model.model.retrievers:
            retriever.register_forward_pre_hook(self._enter)
            retriever.register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, inputs: Any) -> None:
        self.start = now()

    def _leave(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self.seconds += now() - self.start


class Reader:
    """A model, its cache, and random text without end."""

    def __init__(self, model: DRTForCausalLM) -> None:
        self.model, self.cache, self.clock = model, DRTCache(model.config), RetrievalClock(model)

    def passes(self, count: int, tokens: int, keep: int | None) -> dict[str, float]:
        """Median seconds a token, and the share of retrieval, of so many passes; None: only remembered."""
        times, before = [], self.clock.seconds
        for _ in range(count):
            ids = torch.randint(3, self.model.config.vocab_size, (1, tokens))
            start = now()
            if keep is None:
                self.model.model.remember(ids, self.cache)
            else:
                self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
            times.append(now() - start)
        share = (self.clock.seconds - before) / sum(times)
        return {"seconds": statistics.median(times) / tokens, "share": share}


@torch.inference_mode()
def main() -> None:
    """Measure, show, write."""
    command = parser(__doc__)
    command.add_argument(
        "--lengths", type=lengths, default="16K,64K,256K,1M,4M", help="(default: %(default)s)"
    )
    command.add_argument("--segment-size", type=int, default=4096, help="tokens (default: %(default)s)")
    options = command.parse_args()
    report = Report("cost of a token", options)
    model, _ = load_model(shipped_checkpoint(), dtype=torch.float32)
    assert isinstance(model, DRTForCausalLM)
    reader, size = Reader(model.eval()), options.segment_size
    for length in options.lengths:
        while reader.cache.seen_tokens + 2 * PASSES * size < length:
            reader.passes(1, size, keep=None)
        reading, everything = reader.passes(PASSES, size, keep=None), reader.passes(PASSES, size, keep=0)
        decoding = reader.passes(TOKENS, 1, keep=1)
        report.add(
            length=length,
            model="DRT",
            read_us=1e6 * reading["seconds"],
            all_logits_us=1e6 * everything["seconds"],
            all_logits_retrieval_share=everything["share"],
            decode_ms=1e3 * decoding["seconds"],
            decode_retrieval_share=decoding["share"],
            peak_rss_mb=peak_rss_bytes() / 1e6,
        )
    panels = {"read_us": "reading, us a token", "all_logits_us": "all logits, us a token"}
    report.finish("length", "model", panels | {"decode_ms": "ms a generated token"})


if __name__ == "__main__":
    main()
