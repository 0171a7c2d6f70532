"""Waiting jobs by stage and model, always in the order in which they are to be served."""

import bisect
import time

from orchestrator.job import LiveJob, ModelKey
from protocol.stages import STAGES, Stage


class StageQueues:
    """Sorted lists; adding and removing cost a search and a move of memory, which is cheap up to 100,000 jobs."""

    def __init__(self) -> None:
        self._lists: dict[tuple[Stage, ModelKey], list[tuple[tuple[int, int], str]]] = {}
        self.depth: dict[Stage, int] = dict.fromkeys(STAGES, 0)

    def add(self, job: LiveJob) -> None:
        bisect.insort(self._lists.setdefault((job.stage, job.model), []), (job.order, job.id))
        self.depth[job.stage] += 1
        job.queued = time.monotonic()

    def remove(self, job: LiveJob) -> None:
        """Take a job out of its stage's queue; nothing happens if it isn't there."""
        entries = self._lists.get((job.stage, job.model), [])
        at = bisect.bisect_left(entries, (job.order, job.id))
        if at < len(entries) and entries[at][1] == job.id:
            del entries[at]
            self.depth[job.stage] -= 1

    def ahead_of(self, job: LiveJob) -> int:
        """How many jobs are served before this one at its stage."""
        return bisect.bisect_left(self._lists.get((job.stage, job.model), []), (job.order, job.id))

    def first(self, stage: Stage, model: ModelKey, count: int) -> list[str]:
        return [job for _, job in self._lists.get((stage, model), [])[:count]]
