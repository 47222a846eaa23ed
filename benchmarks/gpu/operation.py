"""Grouped cross-attention at the shapes of the paper's 128M model, against what else one would use.

    python benchmarks/gpu/operation.py --output results

12 heads of 64, chunks of 63 tokens, 8 of them for each block of 64 queries, bfloat16, 1K to 64K tokens:
- indices: this project's kernels, reading chunks where they lie;
- gathered: a copy of every selected chunk, FlashAttention chunk by chunk, the weighted sum of the results;
- one softmax: the same copy, one FlashAttention over all chunks of a block (no weights: another function);
- causal: FlashAttention over the whole sequence (another function still, and quadratic);
- popular: as indices, with every block selecting the same chunks.
The floor is the larger of bytes / bandwidth and FLOPs / rate of a large matrix product, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Report, ceilings, parser, peak_mebibytes, seconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drt.ops.grouped_cross_attention import gather_chunks, grouped_cross_attention

HEADS, DIM, SIZE, SLOTS, BLOCK = 12, 64, 63, 8, 64
Inputs = dict[str, Tensor]


def draw(length: int, device: torch.device, *, popular: bool = False) -> Inputs:
    """Random tensors; each block selects among the chunks before it."""
    blocks = length // BLOCK
    query, grad = (torch.randn(1, length, HEADS, DIM, device=device).bfloat16() for _ in range(2))
    keys, values = (torch.randn(1, blocks, SIZE, HEADS, DIM, device=device).bfloat16() for _ in range(2))
    visible = torch.arange(blocks, device=device).clamp_min(1)
    indices = (torch.rand(SLOTS, blocks, device=device) * visible).long().T[None].contiguous()
    if popular:
        indices = torch.arange(SLOTS, device=device).clamp_max(blocks - 1).expand(1, blocks, -1).contiguous()
    weights = torch.softmax(torch.randn(1, blocks, SLOTS, device=device), -1)
    for tensor in (query, keys, values, weights):
        tensor.requires_grad_()
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "indices": indices,
        "weights": weights,
        "grad": grad,
    }


def by_indices(x: Inputs) -> Tensor:
    return grouped_cross_attention(
        x["query"], x["keys"], x["values"], x["indices"], x["weights"], block_size=BLOCK
    )


def gathered(x: Inputs) -> Tensor:
    blocks = x["indices"].shape[1]
    keys, values = (
        gather_chunks(x[name], x["indices"])[0].permute(0, 1, 3, 2, 4) for name in ("keys", "values")
    )
    query = x["query"].view(blocks, 1, BLOCK, HEADS, DIM).transpose(2, 3).expand(-1, SLOTS, -1, -1, -1)
    outputs = scaled_dot_product_attention(*(t.flatten(0, 1) for t in (query, keys, values)))
    weights = x["weights"].view(blocks, SLOTS, 1, 1, 1).to(outputs.dtype)
    output = (outputs.unflatten(0, (blocks, SLOTS)) * weights).sum(1)
    return output.transpose(1, 2).reshape(1, -1, HEADS, DIM)


def one_softmax(x: Inputs) -> Tensor:
    blocks = x["indices"].shape[1]
    keys, values = (
        gather_chunks(x[name], x["indices"])[0].permute(0, 3, 1, 2, 4).flatten(2, 3)
        for name in ("keys", "values")
    )
    query = x["query"].view(blocks, BLOCK, HEADS, DIM).transpose(1, 2)
    return scaled_dot_product_attention(query, keys, values).transpose(1, 2).reshape(1, -1, HEADS, DIM)


def causal(x: Inputs) -> Tensor:
    length = x["query"].shape[1]
    keys, values = (x[name].flatten(1, 2) for name in ("keys", "values"))
    pad = length - keys.shape[1]
    keys, values = (torch.cat([t, t[:, :pad]], 1).transpose(1, 2) for t in (keys, values))
    return scaled_dot_product_attention(x["query"].transpose(1, 2), keys, values, is_causal=True).transpose(
        1, 2
    )


METHODS: dict[str, Callable[[Inputs], Tensor]] = {
    "indices": by_indices,
    "gathered": gathered,
    "one softmax": one_softmax,
    "causal": causal,
    "popular": by_indices,
}


def floor(length: int, backward: bool, ceiling: dict[str, float]) -> float:
    """Seconds that the operation cannot do without: each tensor moved once, each product made once."""
    tensors = 2 * length * HEADS * DIM * (1 + SIZE / BLOCK)  # query and output; keys and values
    flops = 4 * length * SLOTS * SIZE * HEADS * DIM
    # Backward: three tensors more of each kind, and five products where the forward has two.
    moved, made = (tensors * 2 * 3, flops * 3.5) if backward else (tensors * 2, flops)
    return max(moved / ceiling["bytes_per_s"], made / ceiling["flops_per_s"])


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("operation", options)
    ceiling = report.case({"case": "ceilings"}, lambda: ceilings(report.device, tiny=options.tiny))
    lengths = [128, 256] if options.tiny else [2**10, 2**12, 2**14, 2**16]

    def measure(method: str, length: int, backward: bool) -> dict[str, float | None]:
        x = draw(length, report.device, popular=method == "popular")
        leaves = [x[name] for name in ("query", "keys", "values", "weights")]

        def run() -> None:
            with torch.set_grad_enabled(backward):
                output = METHODS[method](x)
            if backward:
                torch.autograd.grad(output, leaves, x["grad"], allow_unused=True)

        time = seconds(run, report.device)
        result = {"ms": time * 1e3, "peak_mib": peak_mebibytes(run, report.device)}
        if "flops_per_s" in ceiling:
            result["of_floor"] = floor(length, backward, ceiling) / time
        return result

    for length in lengths:
        for backward in (False, True):
            times = {}
            for method in METHODS:
                labels = {
                    "case": method,
                    "tokens": length,
                    "pass": "forward+backward" if backward else "forward",
                }
                found = report.case(labels, lambda m=method, n=length, b=backward: measure(m, n, b))
                times[method] = found.get("ms")
            if times["indices"] and times["gathered"]:
                report.add(
                    {**labels, "case": "gathered / indices", "times": times["gathered"] / times["indices"]}
                )
    report.show(["case", "tokens", "pass", "ms", "peak_mib", "of_floor", "times"])


if __name__ == "__main__":
    main()
