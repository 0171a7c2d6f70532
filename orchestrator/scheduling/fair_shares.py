"""Fair shares of the workers' time between owners of jobs: weighted fair queueing over seconds, not over jobs.

An owner's virtual time is what its tasks have taken, in seconds over its weight; the owner who is furthest behind is
served next. The stack's virtual time is that at which the last task began (start-time fair queueing, Goyal, Vin and
Cheng 1996). Whoever begins to have jobs begins there, and nobody is further behind than MOST_BEHIND: neither time in
which an owner had no jobs, nor time in which its jobs could not be done, is saved up for a burst. A task is charged by
an estimate when it begins, so that several workers don't all serve one owner, and by what it took when its worker is
free again. Of the owner's own jobs, priority and age decide.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

MOST_BEHIND = 60.0  # seconds over weight
Owner = TypeVar("Owner")


class FairShares(Generic[Owner]):
    def __init__(self, weight_of: Callable[[Owner], float] = lambda owner: 1.0) -> None:
        self._weight_of = weight_of
        self._jobs: Counter[Owner] = Counter()  # unfinished, by owner
        self._time: dict[Owner, float] = {}  # virtual, by owner
        self._now = 0.0  # virtual

    def add(self, owner: Owner) -> None:
        """Count a job that begins."""
        if not self._jobs[owner]:
            self._time[owner] = max(self._time.get(owner, 0.0), self._now)
        self._jobs[owner] += 1

    def remove(self, owner: Owner) -> None:
        """Count a job that ends. What an owner has taken is remembered until the others have had as much."""
        self._jobs[owner] -= 1
        if not self._jobs[owner]:
            del self._jobs[owner]
            self._time = {one: time for one, time in self._time.items() if one in self._jobs or time > self._now}

    def begin(self, owner: Owner, seconds: float) -> None:
        """Charge an owner for a task that begins, by what is expected of it."""
        start = self._start(owner)
        self._now = max(self._now, start)
        self._time[owner] = start + self.cost(owner, seconds)

    def correct(self, owner: Owner, seconds: float) -> None:
        """Charge an owner for what a task took longer than was expected; less than 0 gives back."""
        self._time[owner] = self._time.get(owner, self._now) + self.cost(owner, seconds)

    def cost(self, owner: Owner, seconds: float) -> float:
        return seconds / self._weight_of(owner)

    def merged(self, tasks: Mapping[Owner, Iterable[tuple[str, float]]]) -> Iterator[str]:
        """Yield jobs in the order in which they are to be served, from each owner's own order.

        `tasks` are jobs with the seconds that they are expected to take.
        """
        queues = {owner: iter(own) for owner, own in tasks.items()}
        heap = [(self._start(owner), number, owner) for number, owner in enumerate(queues)]
        heapq.heapify(heap)
        while heap:
            time, number, owner = heapq.heappop(heap)
            if (task := next(queues[owner], None)) is not None:
                yield task[0]
                heapq.heappush(heap, (time + self.cost(owner, task[1]), number, owner))

    def _start(self, owner: Owner) -> float:
        """Return the virtual time at which an owner's next task begins."""
        return max(self._time.get(owner, self._now), self._now - MOST_BEHIND)
