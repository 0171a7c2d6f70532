"""A process that holds memory, so that a large machine has no more left than a small one, page cache included."""

import contextlib
import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator

import psutil

MCL_CURRENT, MCL_FUTURE = 1, 2
PAGE = 4096


def hold(size: int) -> None:
    """Hold so many bytes, locked against swapping, until stdin ends."""
    if ctypes.CDLL(None, use_errno=True).mlockall(MCL_CURRENT | MCL_FUTURE):
        sys.exit(f"memory can't be locked: error {ctypes.get_errno()}")
    memory = mmap.mmap(-1, size)
    for start in range(0, size, PAGE):
        memory[start] = 1
    print("held", flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def balloon(left: int) -> Iterator[None]:
    """Leave so many bytes of this machine's memory meanwhile; nothing where there are fewer already."""
    size = psutil.virtual_memory().available - left
    if size <= 0:
        yield
        return
    command = [sys.executable, "-m", "scripts.bench.balloon", str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline(), "memory could not be held"
            yield
        finally:
            process.stdin.close()


if __name__ == "__main__":
    hold(int(sys.argv[1]))
