"""The training step at the sizes of the paper's 128M model, against the window-only model and full attention.

    python benchmarks/gpu/training.py --output results

Hidden size 768, 12 heads, SwiGLU 2048, 6 + 6 layers, 2 encoder layers, chunks of 63, top 8, window 512, 50,257 tokens;
weights in float32, autocast to bfloat16, fused AdamW, 32K tokens a step.
- drt x1, drt x2: one and two retrieval groups;
- window, window + 2: the sliding-window model of as many layers, and of two more;
- full: full attention by FlashAttention.
"of window" is time over the window-only model's at the same length. MFU counts what the mathematics needs (three
times the forward pass) over the rate of a large bfloat16 matrix product in the same run.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Report, ceilings, parser, peak_mebibytes, seconds
from torch import nn

from drt.models.cost import training_flops
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.full_attention import FullAttentionConfig, FullAttentionForCausalLM
from drt.models.window import WindowConfig, WindowForCausalLM

PAPER = {"vocab_size": 50257, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
TINY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
MODELS = ("window", "drt x1", "drt x2", "window + 2", "full")
TOKENS = 2**15


def build(name: str, tiny: bool) -> nn.Module:
    sizes = TINY if tiny else PAPER
    if name == "full":
        return FullAttentionForCausalLM(FullAttentionConfig(**sizes, num_hidden_layers=12))
    if name.startswith("window"):
        layers = 14 if name.endswith("2") else 12
        return WindowForCausalLM(WindowConfig(**sizes, num_hidden_layers=layers, sliding_window=512))
    return DRTForCausalLM(DRTConfig(**sizes, num_groups=int(name[-1])))


class Step:
    """One training step on random tokens."""

    def __init__(self, model: nn.Module, batch: int, length: int, device: torch.device) -> None:
        self.model, self.device = model, device
        vocabulary = model.config.vocab_size
        self.tokens = torch.randint(0, vocabulary, (batch, length), device=device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default=",".join(MODELS))
    options.add_argument("--lengths", default="")
    options.add_argument("--eager-only", action="store_true", help="no torch.compile")
    arguments = options.parse_args()
    report = Report("training", arguments)
    device = report.device
    ceiling = report.case({"case": "ceilings"}, lambda: ceilings(device, tiny=arguments.tiny))
    # The longest of the paper first, so that a cut run has it.
    lengths = [200] if arguments.tiny else [2**14, 2**12, 2**15]
    if arguments.lengths:
        lengths = [int(length) for length in arguments.lengths.split(",")]
    baseline: dict[tuple[int, bool], float] = {}

    def measure(name: str, length: int, compiled: bool) -> dict[str, Any]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = build(name, arguments.tiny).to(device).train()
        config = model.config
        batch = 1 if arguments.tiny else max(1, TOKENS // length)
        step = Step(torch.compile(model) if compiled else model, batch, length, device)
        time = seconds(step, device, at_least=1.0)
        found = {
            "batch": batch,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "ms": time * 1e3,
            "tokens_per_s": batch * length / time,
            "peak_mib": peak_mebibytes(step, device),
        }
        if name == "window":
            baseline[length, compiled] = time
        if (length, compiled) in baseline:
            found["of_window"] = time / baseline[length, compiled]
        if "flops_per_s" in ceiling:
            made = training_flops(config, length) * batch * length
            found["mfu"] = made / time / ceiling["flops_per_s"]
        return found

    for length in lengths:
        for compiled in (False,) if arguments.eager_only else (False, True):
            for name in arguments.models.split(","):
                labels = {"case": name, "tokens": length, "compiled": compiled}
                report.case(labels, lambda m=name, n=length, c=compiled: measure(m, n, c))
    report.show(["case", "tokens", "batch", "compiled", "ms", "tokens_per_s", "mfu", "of_window", "peak_mib"])


if __name__ == "__main__":
    main()
