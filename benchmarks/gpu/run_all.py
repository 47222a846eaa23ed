"""All GPU benchmarks, each in a process of its own with a share of the time.

    python benchmarks/gpu/run_all.py --output results --budget 400

A crash or a hang of one leaves the others; what each has measured is in results/NAME.jsonl as soon as it is known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

# Arguments of each, and its share of the time.
BENCHMARKS = [
    (["operation.py"], 0.15),
    (["window.py"], 0.15),
    (["training.py"], 0.45),
    (["retrieval.py"], 0.05),
    (["reading.py", "--store", "host"], 0.2),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for all together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    failed = 0
    for (script, *arguments), share in BENCHMARKS:
        budget = share * options.budget
        command = [
            sys.executable,
            str(Path(__file__).parent / script),
            *arguments,
            "--device",
            options.device,
        ]
        command += ["--output", str(options.output), "--budget", str(budget)]
        if options.tiny:
            command.append("--tiny")
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        print("+", *command, flush=True)
        try:
            failed += (
                subprocess.run(command, env=environment, timeout=budget + 30, check=False).returncode != 0
            )
        except subprocess.TimeoutExpired:
            print(f"{script} hung and was ended", flush=True)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
