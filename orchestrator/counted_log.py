"""Log lines that peers can cause at will: the first is said at once, the others are counted and said once a minute."""

import logging
import threading
import time
from collections.abc import Callable

SAY_SECONDS = 60.0
MOST_KINDS = 256  # of lines that are counted apart


class CountedLog:
    """For any thread."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._counts: dict[str, int] = {}  # by what is said, since it was said last
        self._said = clock()
        self._lock = threading.Lock()

    def warn(self, what: str, detail: str = "") -> None:
        """Say a line, unless it was said within the last minute; `detail` is of the one that is said."""
        with self._lock:
            if what in self._counts:
                self._counts[what] += 1
                return
            if len(self._counts) >= MOST_KINDS:
                return
            self._counts[what] = 0
        self._log.warning(f"{what} ({detail})" if detail else what)  # whole, since logs tell lines apart by their form

    def tell(self) -> None:
        """Say how often each line would have been said, once a minute."""
        if self._clock() - self._said < SAY_SECONDS:
            return
        self._said = self._clock()
        with self._lock:
            counts, self._counts = self._counts, {}
        for what, count in counts.items():
            if count:
                self._log.warning(f"{what}: {count} times more within {SAY_SECONDS:.0f} s")
