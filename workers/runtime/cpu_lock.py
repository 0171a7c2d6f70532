"""Taking turns on a device that several processes would otherwise compute on at once.

Each worker on a CPU uses all its cores, as the plain pipeline does: with fewer threads the sums come out in another
order, and so do the last bits. Two such processes at once spend their time waiting for each other's threads (5.2
pictures a second became 1.1 on two cores), so they take turns, a task at a time.
"""

import contextlib
import ctypes
import fcntl
from collections.abc import Iterator
from pathlib import Path

import torch

SOFT_PAUSE = 1  # omp_pause_soft


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Hold the lock file for a task; the kernel lets go of it if this process dies. Nothing happens without one."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        end_idle_threads()


def end_idle_threads() -> None:
    """End OpenMP's threads of this thread, which else spin for milliseconds into another process's turn.

    The next computation starts them again, in 0.2 ms.
    """
    with contextlib.suppress(OSError, AttributeError):  # an OpenMP older than 5.0, or none
        ctypes.CDLL(torch._C.__file__).omp_pause_resource_all(SOFT_PAUSE)
