"""Inputs that fuzzing has found to reach far: none of them does any harm."""

import subprocess
import sys

from tests.tiny import environment


def test_inputs_that_were_kept_end_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.faults.fuzz", "kept"],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(counts) == 2
    assert min(counts) > 100
