"""A short soak: random load and random faults, and the books balance."""

import subprocess
import sys

import pytest

from tests.tiny import environment


@pytest.mark.all
def test_twenty_seconds_of_trouble_loses_and_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.faults.soak", "--minutes", "0.3", "--seed", "7", "--pause", "1"],
        capture_output=True, text=True, env=environment(), timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "lost: 0\nduplicated: 0\ndiffering: 0\n" in done.stdout
