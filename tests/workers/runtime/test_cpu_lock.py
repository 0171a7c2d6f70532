"""Workers on one CPU compute one at a time, and one that dies holds up nobody."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workers.runtime.cpu_lock import CpuTurn

HOLDER = """
import sys, pathlib
from workers.runtime.cpu_lock import CpuTurn
with CpuTurn(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_and_a_dead_holder_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("two held it at once")
        except BlockingIOError:
            pass
    os.kill(holder.pid, signal.SIGKILL)
    with CpuTurn(lock):  # comes through, or the test's time runs out
        pass
    holder.communicate()


def test_without_a_lock_there_is_nothing_to_wait_for() -> None:
    with CpuTurn(None) as turn, turn.left():
        pass


def test_others_have_their_turn_in_the_middle_of_a_task(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    with CpuTurn(lock) as turn:
        with turn.left(), CpuTurn(lock):  # comes through
            pass
        with lock.open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
