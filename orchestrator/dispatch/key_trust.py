"""How long a key's workers get no task after they were gone with one, or gave nonsense for it."""

import time
from collections.abc import Callable

from orchestrator.principal import KeyHolder, Principal

FIRST_SECONDS, MOST_SECONDS = 1.0, 300.0


class KeyTrust:
    """Each failure in a row doubles the rest; a task that is done ends it. This machine's own workers never rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[Principal, tuple[float, float]] = {}  # (seconds, until)

    def failed(self, principal: Principal) -> None:
        if isinstance(principal, KeyHolder):
            last, until = self._rests.get(principal, (FIRST_SECONDS / 2, 0.0))
            if until <= self._clock():  # several workers of a host that is gone are one failure
                seconds = min(MOST_SECONDS, 2 * last)
                self._rests[principal] = seconds, self._clock() + seconds

    def worked(self, principal: Principal) -> None:
        self._rests.pop(principal, None)

    def rests(self, principal: Principal) -> bool:
        """Return whether a principal's workers get nothing to do now."""
        return self._rests.get(principal, (0.0, 0.0))[1] > self._clock()

    def next_due(self) -> float | None:
        """Seconds of the clock when the next rest is over; None if nobody rests."""
        now = self._clock()
        return min((until for _, until in self._rests.values() if until > now), default=None)
