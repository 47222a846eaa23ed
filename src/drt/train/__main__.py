"""`python -m drt.train CONFIG [--set KEY=VALUE ...]`: what `drt train` does."""

from __future__ import annotations

import argparse
import sys

from drt.terminal import program


def main() -> None:
    """Run one training; the exit code is 0 when it finished, 130 after Ctrl-C, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m drt.train", description="Train from one YAML file.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key")
    parsed = parser.parse_args()
    with program():
        from drt.train.config import load_config
        from drt.train.run import run_training

        run_training(load_config(parsed.config, parsed.set), ["python", "-m", "drt.train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
