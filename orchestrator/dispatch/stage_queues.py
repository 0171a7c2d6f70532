"""Waiting jobs by stage and model, always in the order in which they are to be served."""

import bisect
import time
from collections import Counter

from orchestrator.job import LiveJob, ModelKey
from protocol.stages import Stage


class StageQueues:
    """Sorted lists; adding and removing cost a search and a move of memory, which is cheap up to 100,000 jobs."""

    def __init__(self) -> None:
        self._lists: dict[tuple[Stage, ModelKey], list[tuple[tuple[int, int, int], str]]] = {}
        self._since: dict[str, float] = {}  # monotonic seconds by job, when it came to wait
        self.depth: Counter[tuple[Stage, int]] = Counter()  # by stage and distance to the end

    def add(self, job: LiveJob) -> None:
        bisect.insort(self._lists.setdefault((job.stage, job.model), []), (job.order, job.id))
        self.depth[job.stage, job.distance] += 1
        self._since[job.id] = time.monotonic()

    def remove(self, job: LiveJob) -> None:
        """Take a job out of its stage's queue; nothing happens if it isn't there."""
        entries = self._lists.get((job.stage, job.model), [])
        at = bisect.bisect_left(entries, (job.order, job.id))
        if at < len(entries) and entries[at][1] == job.id:
            del entries[at]
            self.depth[job.stage, job.distance] -= 1
            del self._since[job.id]

    def since(self, job_id: str) -> float:
        """Monotonic seconds when a waiting job came to its stage."""
        return self._since[job_id]

    def at(self, stage: Stage, model: ModelKey) -> int:
        """Return how many jobs wait at a stage for a model."""
        return len(self._lists.get((stage, model), ()))

    def ahead_of(self, job: LiveJob) -> int:
        """Return how many jobs are served before this one at its stage."""
        return bisect.bisect_left(self._lists.get((job.stage, job.model), []), (job.order, job.id))

    def first(self, stage: Stage, model: ModelKey, count: int) -> list[str]:
        return [job for _, job in self._lists.get((stage, model), [])[:count]]
