"""One training step on the CPU: DRT against models without a chunk memory.

    python benchmarks/training_step.py --json training_step.jsonl --plot training_step.png

Forward, backward and optimiser step in float32, random bytes, rows of a length as many as make 4K tokens. The
proportions are those of the paper's model (6 + 6 layers, 2 encoder layers, heads of 64, chunks of 63 tokens, 8
retrieved, a window of 512) at the width that is asked for. The window model of the same depth leaves the chunk memory
out; "+ 2 layers" has about DRT's parameters; full attention is the plain Transformer. A contender whose step took
longer than --patience is not asked for a longer length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Report, lengths, parser, seconds
from transformers import PreTrainedModel

from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.full_attention import FullAttentionConfig, FullAttentionForCausalLM
from drt.models.window import WindowConfig, WindowForCausalLM

TOKENS = 4096


def contenders(width: int) -> dict[str, PreTrainedModel]:
    """DRT and its rivals of that width."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_attention_heads": width // 64,
        "position_embedding": "alibi",
    }
    drt = DRTConfig(**sizes, num_lower_layers=6, num_upper_layers=6, num_encoder_layers=2)
    rope = {**sizes, "position_embedding": "rope"}
    return {
        "DRT": DRTForCausalLM(drt),
        "window": WindowForCausalLM(WindowConfig(**sizes, num_hidden_layers=12)),
        "window + 2 layers": WindowForCausalLM(WindowConfig(**sizes, num_hidden_layers=14)),
        "full attention": FullAttentionForCausalLM(FullAttentionConfig(**rope, num_hidden_layers=12)),
    }


def stepper(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    """A training step on those tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, show, write."""
    command = parser(__doc__)
    command.add_argument("--lengths", type=lengths, default="1K,4K,16K,32K", help="(default: %(default)s)")
    command.add_argument("--width", type=int, default=256, help="hidden size (default: %(default)s)")
    command.add_argument("--patience", type=float, default=60, help="seconds (default: %(default)s)")
    options = command.parse_args()
    report = Report("training step", options)
    torch.manual_seed(0)
    models = contenders(options.width)
    for length in options.lengths:
        ids = torch.randint(3, 259, (max(1, TOKENS // length), length))
        times = seconds(
            {name: stepper(model.train(), ids) for name, model in models.items()}, options.repeats
        )
        for name, time in times.items():
            report.add(
                model=name,
                length=length,
                parameters=sum(parameter.numel() for parameter in models[name].parameters()),
                us_per_token=1e6 * time / ids.numel(),
                over_window=time / times["window"],
            )
            if time > options.patience:
                del models[name]
    report.finish("length", "model", {"us_per_token": "us a token", "over_window": "times the window model"})


if __name__ == "__main__":
    main()
