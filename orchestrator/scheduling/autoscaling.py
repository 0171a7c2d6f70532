"""How many hosts a stack should have, by what waits and what a start costs. Pure: the time is an argument."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """The work that there is, for hosts that are alike."""

    waiting: float  # GPU seconds that nobody has begun
    busy: Sequence[int]  # for each host that is here, its GPUs that have something to do
    starting: int = 0  # hosts that were asked for and are not here yet


@dataclass(frozen=True, slots=True)
class ScalingTerms:
    gpus: int  # of a host
    most: int  # hosts
    least: int = 0
    start_seconds: float = 60.0  # from asking for a host until its workers stand ready
    patience: float = 30.0  # seconds within which what waits should be done, once a host is here


class Autoscaler:
    """Says how many hosts are wanted, starting ones included.

    More, as soon as what waits would still wait when another host is here, and then as many as do it within patience.
    Fewer, where fewer have been enough for as long as a start takes: then a host that has to come again has cost no
    more than it would have cost to keep it.
    """

    def __init__(self, terms: ScalingTerms) -> None:
        self.terms = terms
        self._since = math.inf  # when it was asked first
        self._needed: deque[tuple[float, int]] = deque()  # (when, hosts), more of them than at any later time

    def wanted(self, work: Work, now: float) -> int:
        """Return how many hosts there should be; call it each second or so, `now` in monotonic seconds."""
        terms, hosts = self.terms, len(work.busy) + work.starting
        needed = self._needed_for(work, hosts)
        self._since = min(self._since, now)
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now, needed))
        while self._needed[0][0] < now - terms.start_seconds:
            self._needed.popleft()
        lately = self._needed[0][1]
        return self._within(lately if now - self._since >= terms.start_seconds else max(hosts, lately))

    def _needed_for(self, work: Work, hosts: int) -> int:
        """Return how many hosts the work of this moment needs."""
        terms = self.terms
        behind = work.waiting - hosts * terms.gpus * terms.start_seconds
        if behind > 0 and hosts:
            return hosts + math.ceil(behind / (terms.gpus * max(1.0, terms.patience)))
        occupied = sum(work.busy) + work.waiting / max(1.0, terms.patience)  # GPUs
        return min(max(hosts, 1), math.ceil(occupied / terms.gpus))

    def _within(self, hosts: int) -> int:
        return max(self.terms.least, min(self.terms.most, hosts))


def least_busy(busy: Sequence[int]) -> int:
    """Return the index of the host that can be spared best: one with the least to do."""
    return min(range(len(busy)), key=lambda index: busy[index])
