"""A counter that a process moves at each turn of its loop, so that its parent can tell busy from stuck."""

import contextlib
import os
import struct
import sys
import tempfile
import time

PULSE = "TRIPTYCH_PULSE"  # environment variable with the number of the file descriptor that a child gets


class Pulse:
    """The child's side."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor, self._count = descriptor, 0

    @staticmethod
    def inherited() -> "Pulse":
        """Return the pulse that the parent gave; one that nobody looks at where it gave none."""
        number = os.environ.get(PULSE)
        return Pulse(int(number) if number else None)

    def beat(self) -> None:
        if self._descriptor is not None:
            self._count += 1
            with contextlib.suppress(OSError):  # where it lies on a disk, that may be full
                os.pwrite(self._descriptor, struct.pack("<Q", self._count), 0)


class PulseWatch:
    """The parent's side: a file without a name, which the child gets as `descriptor`."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("triptych-pulse")
        else:
            self.descriptor, path = tempfile.mkstemp(prefix="triptych-")
            os.unlink(path)
        self._last, self._moved = b"", time.monotonic()

    def still_for(self) -> float:
        """Seconds since the child's loop has made a turn, as far as was looked."""
        if (now := os.pread(self.descriptor, 8, 0)) != self._last:
            self._last, self._moved = now, time.monotonic()
        return time.monotonic() - self._moved

    @property
    def beaten(self) -> bool:
        """Return whether the child's loop had made a turn at the last look."""
        return bool(self._last)

    def close(self) -> None:
        os.close(self.descriptor)
