"""The end of a process that nobody asks for any more."""

import os
import threading
import time

FORGOTTEN_SECONDS = 600.0  # without a launcher, whose stack may be gone for good


class Asked:
    """Ends this process once it was not asked for, for too long."""

    def __init__(self, seconds: float = FORGOTTEN_SECONDS) -> None:
        self._last, self._seconds = time.monotonic(), seconds
        threading.Thread(target=self._watch, daemon=True, name="asked").start()

    def again(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() - self._last < self._seconds:
            time.sleep(min(1.0, self._seconds / 4))
        os._exit(0)
