"""What a DRT language model's chunk memory is worth to it: its loss with other memories than its own.

    python benchmarks/memory_use.py runs/lm/linux-drt-x2-s0/final data/corpora/linux --json memory_use.jsonl

Rows spread over a split of a corpus are read four times:
- own: as the model reads;
- uniform: the chunks that it selects, all with the same weight;
- random: its weights, on chunks drawn at random from those before;
- none: no chunk at all.
Bits a token by position, and the share of tokens that the memory helps or hurts by half a nat or more. Of its own
weights: their mean entropy, beside that of equal ones, and the mean of the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from drt.data.corpus import open_corpus
from drt.data.needles import parse_length
from drt.errors import DRTError
from drt.layers.retriever import Retriever
from drt.models.drt import DRTForCausalLM
from drt.models.loading import load_model
from drt.ops.chunk_retrieval import RetrievedChunks

MEMORIES = ("own", "uniform", "random", "none")
HALF_NAT = 0.5


def change(memory: str, generator: torch.Generator) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hooks before and after a retriever that give it another memory."""

    def before(_: Retriever, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, landmarks, visible, gumbel = arguments
        return states, landmarks, torch.zeros_like(visible) if memory == "none" else visible, gumbel

    def after(_: Retriever, arguments: tuple[Any, ...], found: RetrievedChunks) -> RetrievedChunks:
        held = found.chunk_indices >= 0
        if memory == "uniform":
            return found._replace(chunk_weights=held / held.sum(-1, keepdim=True).clamp_min(1))
        if memory == "random":
            drawn = torch.rand(held.shape, generator=generator) * arguments[2].cpu().unsqueeze(-1)
            return found._replace(chunk_indices=drawn.to(held.device).long().where(held, -1))
        return found

    return before, after


@torch.no_grad()
def read(model: DRTForCausalLM, rows: list[Tensor], memory: str) -> tuple[Tensor, list[Tensor]]:
    """Losses (rows, L - 1) in nats, and the weights of each group, (N, K), with at least K chunks to select from."""
    before, after = change(memory, torch.Generator().manual_seed(0))
    retrievers = [module for module in model.modules() if isinstance(module, Retriever)]
    handles = [retriever.register_forward_pre_hook(before) for retriever in retrievers]
    handles += [retriever.register_forward_hook(after) for retriever in retrievers]
    losses, weights = [], []
    try:
        for ids in rows:
            output = model(input_ids=ids.unsqueeze(0), use_cache=False, output_retrieval=True)
            losses.append(cross_entropy(output.logits[0, :-1].float(), ids[1:], reduction="none").cpu())
            for indices, values in zip(output.chunk_indices, output.chunk_weights, strict=True):
                weights.append(values[(indices >= 0).all(-1)].float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(losses), weights


def main() -> None:
    """Parse, read, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a DRT model with a learned retriever")
    parser.add_argument("corpus", type=Path, help="folder of token shards")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=parse_length, default="8K", help="tokens of a row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write JSON lines there")
    options = parser.parse_args()
    try:
        model, _ = load_model(options.checkpoint)
        corpus = open_corpus(options.corpus, options.split)
    except DRTError as error:
        parser.error(str(error))
    if not isinstance(model, DRTForCausalLM) or not any(isinstance(m, Retriever) for m in model.modules()):
        parser.error(f"{options.checkpoint}: expected a DRT model with a learned retriever")
    model.to(options.device)
    starts = np.linspace(0, corpus.num_tokens - options.length, options.rows).astype(int).tolist()
    rows = [corpus.tokens(start, start + options.length).astype(np.int64) for start in starts]
    ids = [torch.from_numpy(row).to(options.device) for row in rows]
    ends = [end for end in (256, 1024, 4096, 16384, 65536) if end < options.length] + [options.length]
    table = Table(title="bits a token")
    for name in ("memory", *(f"to {end}" for end in ends), "all", "helps", "hurts"):
        table.add_column(name, justify="right")
    own, weights = read(model, ids, "own")
    records = []
    for memory in MEMORIES:
        losses = own if memory == "own" else read(model, ids, memory)[0]
        bits = [
            float(losses[:, start:end].mean()) / math.log(2)
            for start, end in zip((0, *ends), ends, strict=False)
        ]
        total = float(losses.mean()) / math.log(2)
        helps, hurts = (float((sign * (losses - own) >= HALF_NAT).float().mean()) for sign in (1, -1))
        records.append({"memory": memory, "ends": ends, "bits": bits, "all": total})
        records[-1] |= {"helps": helps, "hurts": hurts}
        table.add_row(memory, *(f"{x:.4f}" for x in (*bits, total)), f"{helps:.2%}", f"{hurts:.2%}")
    entropy = float(torch.cat([-(w * w.clamp_min(1e-9).log()).sum(-1) for w in weights]).mean())
    largest = float(torch.cat([w.max(-1).values for w in weights]).mean())
    slots = weights[0].shape[-1]
    records.append({"entropy": entropy, "equal_entropy": math.log(slots), "largest_weight": largest})
    Console().print(table)
    print(
        f"weights: entropy {entropy:.3f} of {math.log(slots):.3f} nats, the largest {largest:.3f} of {slots}"
    )
    with open(options.json or os.devnull, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
