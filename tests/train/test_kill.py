"""A training killed with SIGKILL goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


@pytest.mark.slow
def test_losses_are_the_same_after_kills() -> None:
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "2"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "9 steps, the same: True" in finished.stdout
