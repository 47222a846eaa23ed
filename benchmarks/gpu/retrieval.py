"""What retrieval costs: training passes, where every chunk asks for the chunks before it, and single questions.

    python benchmarks/gpu/retrieval.py --output results

Hidden size 768, top 8. A training pass of 1,024 chunks is one of 64K tokens; 262,144 chunks are 16M tokens.
"""

from __future__ import annotations

import torch
from common import Report, parser, peak_mebibytes, seconds

from drt.ops.chunk_retrieval import retrieve_chunks

HIDDEN, TOP_K = 768, 8


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("retrieval", options)

    def measure(queries: int, chunks: int, gumbel: bool, dtype: torch.dtype) -> dict[str, float | None]:
        query = torch.randn(1, queries, HIDDEN, device=report.device).to(dtype)
        landmarks = torch.randn(1, chunks, HIDDEN, device=report.device).to(dtype)
        visible = torch.arange(chunks - queries, chunks, device=report.device).unsqueeze(0)
        with torch.inference_mode():

            def run() -> None:
                retrieve_chunks(query, landmarks, visible, top_k=TOP_K, gumbel=gumbel)

            return {"ms": seconds(run, report.device) * 1e3, "peak_mib": peak_mebibytes(run, report.device)}

    training = [64] if options.tiny else [64, 256, 1024, 4096]
    reading = [(1, 512)] if options.tiny else [(1, 2**12), (1, 2**15), (1, 2**18), (64, 2**18)]
    for dtype in (torch.float32, torch.bfloat16):
        for queries, chunks, gumbel in [(n, n, g) for n in training for g in (False, True)] + [
            (*shape, False) for shape in reading
        ]:
            labels = {"case": str(dtype), "queries": queries, "chunks": chunks, "gumbel": gumbel}
            report.case(labels, lambda q=queries, c=chunks, g=gumbel, d=dtype: measure(q, c, g, d))
    report.show(["case", "queries", "chunks", "gumbel", "ms", "peak_mib"])


if __name__ == "__main__":
    main()
