"""Workers on one CPU compute one at a time, and one that dies holds up nobody."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from workers.runtime.cpu_lock import turn

HOLDER = """
import sys, pathlib
from workers.runtime.cpu_lock import turn
with turn(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_and_a_dead_holder_lets_go(tmp_path: Path) -> None:
    import fcntl

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
    with turn(lock):  # comes through, or the test's time runs out
        pass
    holder.communicate()


def test_without_a_lock_there_is_nothing_to_wait_for() -> None:
    with turn(None):
        pass
