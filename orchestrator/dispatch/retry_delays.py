"""Jobs that wait a moment before they are tried again."""

import heapq
import time
from collections.abc import Sequence

BACKOFF_SECONDS = (0.0, 0.5, 2.0, 5.0)  # after the first failure of a stage, the second …


class RetryDelays:
    def __init__(self, backoff_seconds: Sequence[float] = BACKOFF_SECONDS) -> None:
        self._backoff_seconds = backoff_seconds
        self._due: dict[str, float] = {}  # by job, monotonic seconds
        self._heap: list[tuple[float, str]] = []

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._due

    def add(self, job_id: str, failures: int) -> bool:
        """Let a job wait, if it has to after so many failures."""
        backoff = self._backoff_seconds
        seconds = backoff[min(failures, len(backoff)) - 1] if failures else 0.0
        if seconds:
            self._due[job_id] = due = time.monotonic() + seconds
            heapq.heappush(self._heap, (due, job_id))
        return seconds > 0

    def drop(self, job_id: str) -> None:
        self._due.pop(job_id, None)

    def take(self) -> list[str]:
        """The jobs whose wait is over."""
        now, over = time.monotonic(), []
        while self._heap and self._heap[0][0] <= now:
            due, job_id = heapq.heappop(self._heap)
            if self._due.get(job_id) == due:
                del self._due[job_id]
                over.append(job_id)
        return over

    def next(self) -> float | None:
        """Monotonic seconds when there is something to take."""
        return self._heap[0][0] if self._heap else None
