"""Taking turns on a device that several processes would otherwise compute on at once.

Each worker on a CPU uses all its cores, as the plain pipeline does: with fewer threads the sums come out in another
order, and so do the last bits. Two such processes at once spend their time waiting for each other's threads (5.2
pictures a second became 1.1 on two cores), so they take turns, a task at a time.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Hold the lock file for a task; the kernel lets go of it if this process dies. Nothing happens without one."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
