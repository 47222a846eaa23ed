"""Kills a training again and again with SIGKILL, and compares its losses with those of a run left alone.

    python benchmarks/resume.py --kills 20

A tiny language model on random bytes, on the CPU; every kill comes at a random moment. Prints where it was killed and
whether all losses are the same bit for bit; exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from drt.data.corpus_writer import ShardWriter, write_manifest
from drt.data.tokenizer import describe_tokenizer, load_tokenizer, save_tokenizer
from drt.train.logs import read_metrics

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_lower_layers": 1,
    "num_upper_layers": 2,
    "num_groups": 2,
    "num_encoder_layers": 1,
    "chunk_size": 15,
    "retrieval_top_k": 2,
    "sliding_window": 16,
    "gumbel_noise": True,
}


def write_corpus(folder: Path) -> None:
    """Random bytes, in a split for training and one for validation."""
    shards = {}
    for seed, split in enumerate(("train", "validation")):
        folder.mkdir(exist_ok=True)
        writer = ShardWriter(folder, split, "uint16")
        tokens = np.random.default_rng(seed).integers(3, 259, 5000)
        writer.add(split, tokens, len(tokens))
        shards[split] = [writer.close()]
    tokenizer = load_tokenizer("bytes")
    save_tokenizer(tokenizer, folder / "tokenizer")
    write_manifest(folder, "uint16", describe_tokenizer(tokenizer, "bytes"), shards, [])


def start(folder: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    """One run, logging every step, in a process of its own."""
    values = {
        "task": "language_model",
        "output_dir": str(folder / name),
        "model": MODEL,
        "data": {"corpus": str(folder / "corpus"), "sequence_length": 64, "validation_sequences": 2},
        "tokens_per_step": 128,
        "rows_per_pass": 1,
        "max_steps": steps,
        "log_every": 1,
        "eval_every": 7,
        "save_every": 3,
        "device": "cpu",
    }
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(values))
    return subprocess.Popen([sys.executable, "-m", "drt.train", str(config)], stderr=subprocess.DEVNULL)


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of training and validation, in order."""
    return [
        (line["step"], line.get("loss", line.get("eval_loss")))
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def kill_after(process: subprocess.Popen[bytes], folder: Path, step: int, delay: float) -> int:
    """Kill a run some seconds after it logged a step; returns the last step that it logged."""
    while process.poll() is None and max((at for at, _ in losses(folder)), default=0) < step:
        time.sleep(0.02)
    time.sleep(delay)
    process.kill()
    process.wait()
    return max((at for at, _ in losses(folder)), default=0)


def main() -> int:
    """0 if every loss is the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    steps = 3 * arguments.kills + 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus")
        start(folder, "whole", steps).wait()
        killed_at = []
        for number in range(arguments.kills):
            step = 3 * number + rng.randrange(1, 4)
            process = start(folder, "killed", steps)
            killed_at.append(kill_after(process, folder / "killed", step, rng.random() / 10))
        start(folder, "killed", steps).wait()
        whole, killed = losses(folder / "whole"), losses(folder / "killed")
    print(
        f"killed after steps {killed_at}; {len(whole)} losses of {steps} steps, the same: {whole == killed}"
    )
    return 0 if whole and whole == killed else 1


if __name__ == "__main__":
    sys.exit(main())
