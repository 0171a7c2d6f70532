"""Restarts of workers, one after the other, on whichever host they are: a stage is never without."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from orchestrator.dispatch.fleet import Fleet
from protocol.stages import Stage
from protocol.views import ProcessView

log = logging.getLogger(__name__)

MOST_SECONDS = 180.0  # that a worker may take to come back, before the next one's turn


class RollingRestarts:
    """`processes` gives those that are kept; `restart` has one by name replaced, and returns whether it can be."""

    def __init__(
        self, fleet: Fleet, processes: Callable[[], Iterable[ProcessView]], restart: Callable[[str], bool]
    ) -> None:
        self._fleet, self._processes, self._restart = fleet, processes, restart
        self._names: deque[str] = deque()  # of processes to be restarted
        self._under_way: int | None = None  # process number of the first's old life
        self._since = 0.0  # monotonic seconds

    def stage(self, stage: Stage) -> None:
        """Restart a stage's workers."""
        self.add([process.name for process in self._processes() if process.stage == stage])

    def add(self, names: Iterable[str]) -> None:
        self._names.extend(name for name in names if name not in self._names)

    def roll(self) -> None:
        """Go on: the next worker once the one before is back."""
        while self._names:
            if self._under_way is not None and time.monotonic() - self._since > MOST_SECONDS:
                log.warning("%s has not come back from its restart; the others go on", self._names[0])
                self._next()
                continue
            name, old = self._names[0], self._under_way
            process = next((p for p in self._processes() if p.name == name), None)
            if process is None or (process.pid is None and old is None):  # it is not there, or no more: a model rests
                self._next()
                continue
            if process.pid is None:
                return
            if old is None:
                self._under_way, self._since = process.pid, time.monotonic()
                if self._restart(name):
                    return
                self._next()
                continue
            namesakes = [w for w in self._fleet if w.hello.name == name and not w.process.key]
            if not any(w.hello.pid != old and w.state != "loading" for w in namesakes):
                return
            self._next()

    def _next(self) -> None:
        self._names.popleft()
        self._under_way = None
