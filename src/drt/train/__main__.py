"""`python -m drt.train CONFIG [--set KEY=VALUE ...]`: what `drt train` does."""

from __future__ import annotations

import argparse
import sys

from drt.errors import DRTError, Interrupted
from drt.train.config import load_config
from drt.train.run import run_training


def main(arguments: list[str] | None = None) -> int:
    """Run one training; 0 when it finished, 130 after Ctrl-C, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m drt.train", description="Train from one YAML file.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key")
    parsed = parser.parse_args(arguments)
    try:
        run_training(load_config(parsed.config, parsed.set), ["python", "-m", "drt.train", *sys.argv[1:]])
    except DRTError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
