"""Waiting jobs by stage and model, always in the order in which they are to be served."""

import bisect
import heapq
import itertools
import time
from collections import Counter

from orchestrator.dispatch.common_stages import CommonStages
from orchestrator.dispatch.task_seconds import TaskSeconds
from orchestrator.job import LiveJob, ModelKey
from orchestrator.principal import Principal
from orchestrator.scheduling.fair_shares import FairShares
from orchestrator.scheduling.snapshot import Line
from protocol.stages import Stage

Entry = tuple[tuple[int, int, int], str, float]  # a job's order, its id, and the seconds that its task may take


class StageQueues:
    """Sorted lists by owner; adding and removing cost a search and a move of memory, cheap up to 100,000 jobs.

    Owners are served by their `shares` of all workers' time, of which `seconds` says what a task may take. Jobs of
    models that share a stage wait there together.
    """

    def __init__(
        self,
        shares: FairShares[Principal] | None = None,
        seconds: TaskSeconds | None = None,
        common: CommonStages | None = None,
    ) -> None:
        self._shares = shares or FairShares[Principal]()
        self.common = common or CommonStages()
        self._seconds = seconds or TaskSeconds(self._shares)
        self._lists: dict[tuple[Stage, ModelKey], dict[Principal, list[Entry]]] = {}
        self._since: dict[str, float] = {}  # monotonic seconds by job, when it came to wait
        self.depth: Counter[Line] = Counter()
        self.changes = 0

    def add(self, job: LiveJob) -> None:
        own = self._lists.setdefault((job.stage, job.model), {}).setdefault(job.owner, [])
        bisect.insort(own, (job.order, job.id, self._seconds.expected(job)))
        self.depth[job.stage, job.model, job.distance] += 1
        self._since[job.id] = time.monotonic()
        self.changes += 1

    def remove(self, job: LiveJob) -> None:
        """Take a job out of its stage's queue; nothing happens if it isn't there."""
        owners = self._lists.get((job.stage, job.model), {})
        entries = owners.get(job.owner, [])
        at = bisect.bisect_left(entries, (job.order, job.id, 0.0))
        if at < len(entries) and entries[at][1] == job.id:
            del entries[at]
            if not entries:
                del owners[job.owner]
            self.depth[job.stage, job.model, job.distance] -= 1
            del self._since[job.id]
            self.changes += 1

    def __len__(self) -> int:
        return len(self._since)

    def since(self, job_id: str) -> float:
        """Monotonic seconds when a waiting job came to its stage."""
        return self._since[job_id]

    def at(self, stage: Stage, model: ModelKey) -> int:
        """Return how many jobs wait at a stage for a model, or for others that share it."""
        return sum(sum(map(len, owners.values())) for owners in self._of(stage, model))

    def own(self, stage: Stage, model: ModelKey) -> int:
        """Return how many jobs of a model wait at a stage."""
        return sum(map(len, self._lists.get((stage, model), {}).values()))

    def _of(self, stage: Stage, model: ModelKey) -> list[dict[Principal, list[Entry]]]:
        """Return the lists of the models that share a stage, by owner, but for those without any job."""
        models = self.common.models(stage, model)
        return [owners for one in models if (owners := self._lists.get((stage, one)))]

    def ahead_of(self, job: LiveJob) -> int:
        """Return about how many jobs are served before this one at its stage: of other owners, as many as its own."""
        lists = self._of(job.stage, job.model)
        mine = (owners.get(job.owner, []) for owners in lists)
        own = sum(bisect.bisect_left(entries, (job.order, job.id, 0.0)) for entries in mine)
        others: Counter[Principal] = Counter()
        for owners in lists:
            others.update({owner: len(entries) for owner, entries in owners.items() if owner != job.owner})
        return own + sum(min(count, own) for count in others.values())

    def first(self, stage: Stage, model: ModelKey, count: int) -> list[str]:
        """Return the first jobs that wait at a stage for a model, or for others that share it."""
        return self._merged(self._of(stage, model), count)

    def first_own(self, stage: Stage, model: ModelKey, count: int) -> list[str]:
        """Return the first jobs of a model that wait at a stage."""
        return self._merged([self._lists.get((stage, model), {})], count)

    def _merged(self, lists: list[dict[Principal, list[Entry]]], count: int) -> list[str]:
        if len(lists) == 1 and len(lists[0]) == 1:
            (entries,) = lists[0].values()
            return [job for _, job, _ in entries[:count]]
        names = dict.fromkeys(owner for owners in lists for owner in owners)
        merged = {owner: heapq.merge(*(owners.get(owner, ()) for owners in lists)) for owner in names}
        tasks = {owner: ((job, seconds) for _, job, seconds in entries) for owner, entries in merged.items()}
        return list(itertools.islice(self._shares.merged(tasks), count))
