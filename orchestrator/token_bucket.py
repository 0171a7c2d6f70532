"""A token bucket: the number of things of a kind that may still come now, at a rate over time."""

import time
from collections.abc import Callable


class TokenBucket:
    """`rate` a second, `burst` at once; `clock` in seconds."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._since = burst, clock()

    def left(self) -> float:
        """Return how many may come now."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        return self._left

    def take(self, count: float = 1.0) -> bool:
        """Take so many, if they are there."""
        if self.left() < count:
            return False
        self._left -= count
        return True

    def spend(self, count: float) -> None:
        """Take so many whether they are there or not: what is missing must come before there are any again."""
        self.left()
        self._left -= count
