"""Window attention: the candidates of one interface, at the shapes of the paper's 128M model.

    python benchmarks/gpu/window.py --output results

12 heads of 64, a window of 512, bfloat16. Beside them: FlashAttention over the whole sequence, and FlashAttention
with a window of its own, which has no ALiBi in its backward (PyTorch's internal operator).
"""

from __future__ import annotations

import torch
from common import Report, ceilings, parser, peak_mebibytes, seconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drt.ops.window_attention import alibi_slopes, window_attention

HEADS, DIM, WINDOW = 12, 64, 512


def flash_window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's FlashAttention with a window; its count of keys leaves out the query itself."""
    length = query.shape[1]
    results = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, length, length, 0.0, True, False, window_size_left=WINDOW - 1,
        window_size_right=0,
    )  # fmt: skip
    return results[0]


def attend(impl: str, slopes: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if impl == "full causal":
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    if impl == "flash window":
        return flash_window(query, key, value)
    return window_attention(query, key, value, window=WINDOW, alibi_slopes=slopes, impl=impl)


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("window", options)
    report.case({"case": "ceilings"}, lambda: ceilings(report.device, tiny=options.tiny))
    impls = ["triton", "flex", "banded", "full causal", "flash window"]

    def measure(impl: str, length: int, alibi: bool, backward: bool) -> dict[str, float | None]:
        query, key, value, grad = (
            torch.randn(1, length, HEADS, DIM, device=report.device).bfloat16() for _ in range(4)
        )
        leaves = [x.requires_grad_(backward) for x in (query, key, value)]
        slopes = alibi_slopes(HEADS).to(report.device) if alibi else None

        def run() -> None:
            output = attend(impl, slopes, *leaves)
            if backward:
                torch.autograd.grad(output, leaves, grad)

        return {"ms": seconds(run, report.device) * 1e3, "peak_mib": peak_mebibytes(run, report.device)}

    for length in [256] if options.tiny else [2**12, 2**14, 2**16]:
        for alibi in (True, False):
            for backward in (False, True):
                for impl in impls:
                    if (alibi and impl in impls[3:]) or (backward and impl == "flash window"):
                        continue
                    labels = {
                        "case": impl,
                        "tokens": length,
                        "positions": "alibi" if alibi else "none",
                        "pass": "forward+backward" if backward else "forward",
                    }
                    report.case(
                        labels,
                        lambda i=impl, n=length, a=alibi, b=backward: measure(i, n, a, b),
                    )
    report.show(["case", "tokens", "positions", "pass", "ms", "peak_mib"])


if __name__ == "__main__":
    main()
