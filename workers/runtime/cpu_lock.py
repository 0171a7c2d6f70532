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
from typing import TextIO

import torch

SOFT_PAUSE = 1  # omp_pause_soft


class CpuTurn:
    """A turn of a process, for a task; the kernel ends it if the process dies. Nothing happens without a lock file."""

    def __init__(self, lock: Path | None) -> None:
        self._lock = lock
        self._file: TextIO | None = None

    def __enter__(self) -> "CpuTurn":
        if self._lock:
            self._file = self._lock.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            end_idle_threads()
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Let others have their turn meanwhile, in the middle of a task."""
        held = self._file is not None
        self.__exit__()
        yield
        if held:
            self.__enter__()


def end_idle_threads() -> None:
    """End OpenMP's threads of this thread, which else spin for milliseconds into another process's turn.

    The next computation starts them again, in 0.2 ms.
    """
    with contextlib.suppress(OSError, AttributeError):  # an OpenMP older than 5.0, or none
        ctypes.CDLL(torch._C.__file__).omp_pause_resource_all(SOFT_PAUSE)
