"""Grouped cross-attention on the CPU, against what one would write or pick instead.

    python benchmarks/operation.py --json operation.jsonl --plot operation.png

At the shapes of the paper's model (12 heads of 64, chunks of 63 tokens, 8 of them for each block of 64 queries),
float32, forward and forward + backward:
- ours: `grouped_cross_attention`, which reads chunks where they lie;
- plain: a copy of every selected chunk, a softmax for each, the weighted sum, as the equations say;
- SDPA per chunk: the same copy, torch's attention chunk by chunk, the weighted sum;
- one softmax: the same copy, torch's attention over all chunks of a block (no weights: another function);
- causal: torch's attention over the whole sequence (another function still, and quadratic).
Memory is what a forward + backward holds at most beyond its inputs, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Report, lengths, parser, peak_bytes, seconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drt.ops.grouped_cross_attention import grouped_cross_attention

HEADS, DIM, SIZE, SLOTS, BLOCK = 12, 64, 63, 8, 64


def gather(chunks: Tensor, indices: Tensor) -> Tensor:
    """(B, C, S, h, D) to the selected (B, N, K, S, h, D)."""
    rows = torch.arange(len(chunks)).view(-1, 1, 1)
    return chunks[rows, indices]


def ours(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return grouped_cross_attention(query, keys, values, indices, weights, block_size=BLOCK)


def plain(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    keys, values = gather(keys, indices), gather(values, indices)
    blocks = query.unflatten(1, (-1, BLOCK))
    scores = torch.einsum("bnqhd,bnkshd->bnhqks", blocks, keys) * DIM**-0.5
    read = torch.einsum("bnhqks,bnkshd->bnkqhd", scores.softmax(-1), values)
    return torch.einsum("bnk,bnkqhd->bnqhd", weights, read).flatten(1, 2)


def sdpa_per_chunk(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    keys, values = (gather(x, indices).flatten(0, 2).transpose(1, 2) for x in (keys, values))
    blocks = query.unflatten(1, (-1, BLOCK))
    repeated = blocks.unsqueeze(2).expand(-1, -1, SLOTS, -1, -1, -1).flatten(0, 2).transpose(1, 2)
    read = scaled_dot_product_attention(repeated, keys, values).transpose(1, 2)
    read = read.unflatten(0, (len(query), -1, SLOTS))
    return torch.einsum("bnk,bnkqhd->bnqhd", weights, read).flatten(1, 2)


def one_softmax(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    keys, values = (gather(x, indices).flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (keys, values))
    blocks = query.unflatten(1, (-1, BLOCK)).flatten(0, 1).transpose(1, 2)
    return scaled_dot_product_attention(blocks, keys, values).transpose(1, 2).reshape(query.shape)


def causal(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    keys, values = (x.flatten(1, 2)[:, : query.shape[1]] for x in (keys, values))
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    return scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "plain": plain,
    "SDPA per chunk": sdpa_per_chunk,
    "one softmax": one_softmax,
    "causal": causal,
}


def measure(length: int, repeats: int, report: Report) -> None:
    """One length: every contender in turn."""
    torch.manual_seed(0)
    chunks = length // BLOCK + 1  # the causal one takes as many keys as there are queries
    query = torch.randn(1, length, HEADS, DIM, requires_grad=True)
    keys, values = (torch.randn(1, chunks, SIZE + 1, HEADS, DIM, requires_grad=True) for _ in range(2))
    weights = torch.rand(1, length // BLOCK, SLOTS).softmax(-1).requires_grad_()
    indices = torch.randint(chunks, (1, length // BLOCK, SLOTS))
    inputs = (query, keys, values, weights)
    grad_output = torch.randn(query.shape)

    def forward(name: str) -> Callable[[], Tensor]:
        table = inputs if name == "causal" else (query, keys[:, :, :SIZE], values[:, :, :SIZE], weights)
        return lambda: CONTENDERS[name](*table, indices)

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(name)(), inputs, grad_output, allow_unused=True)

    torch.testing.assert_close(forward("ours")(), forward("plain")(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward("ours")(), forward("SDPA per chunk")(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        once = seconds({name: forward(name) for name in CONTENDERS}, repeats)
    both = seconds({name: step(name) for name in CONTENDERS}, repeats)
    for name in CONTENDERS:
        memory = peak_bytes(step(name))
        if name == "ours":
            own_memory = memory
        report.add(
            implementation=name,
            length=length,
            forward_ms=1e3 * once[name],
            step_ms=1e3 * both[name],
            peak_mb=memory / 1e6,
            step_over_ours=both[name] / both["ours"],
            peak_over_ours=memory / own_memory,
        )


def main() -> None:
    """Measure, show, write."""
    command = parser(__doc__)
    command.add_argument("--lengths", type=lengths, default="1K,4K", help="queries (default: %(default)s)")
    options = command.parse_args()
    report = Report("operation", options)
    for length in options.lengths:
        measure(length, options.repeats, report)
    panels = {"forward_ms": "forward, ms", "step_ms": "forward + backward, ms", "peak_mb": "peak memory, MB"}
    report.finish("length", "implementation", panels)


if __name__ == "__main__":
    main()
