"""How others do it, with the same costs and the same outages: whole pipelines as replicas, or first come first served.

Each GPU is one server. A task that was on a host that fails is begun anew once that is noticed.
"""

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.planning.hardware import Hardware
from orchestrator.planning.prediction import Terms
from protocol.model_profile import ModelProfile
from protocol.stages import STAGES, USUAL_NEXT, Stage
from scripts.simulate.costs import Arrival, Tally, costs_alone
from scripts.simulate.outages import SILENCE, Outage


@dataclass(frozen=True, slots=True)
class Piece:
    """The work that one GPU does at once for a job: all its stages, or one."""

    job: int
    stages: tuple[Stage, ...]


class Servers:
    """GPUs that each take the piece that has waited longest; of those that are free, one that has its stage in."""

    def __init__(
        self, profile: ModelProfile, hardware: Hardware, terms: Terms, whole: bool,
        outages: Sequence[Outage] = (), gpus: int = 1,
    ) -> None:  # fmt: skip
        """`whole`: each GPU does all of a job, swapping each stage in; `gpus` are those of a host."""
        self._costs = costs_alone(profile, hardware, terms)
        self._whole, self._gpus = whole, gpus
        count = len(hardware.cards)
        self._inside: list[Stage | None] = [None] * count
        self._idle: dict[int, None] = dict.fromkeys(range(count))
        self._has: dict[Stage | None, dict[int, None]] = {stage: {} for stage in (*STAGES, None)}
        self._has[None] = dict.fromkeys(range(count))
        self._doing: dict[int, tuple[Piece, float, float]] = {}  # by GPU: the piece, its begin and its end
        self._lives = [0] * count
        self._missing = 0  # pieces that are lost, and nobody knows yet
        self._waiting: deque[Piece] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrivals: Sequence[Arrival] = ()
        self.tally, self.now = Tally(), 0.0
        for outage in outages:
            if outage.noticed:
                self._at(outage.begin, functools.partial(self._begin, outage))

    def run(self, arrivals: Sequence[Arrival]) -> Tally:
        """Simulate all arrivals, to the last picture."""
        self._arrivals = arrivals
        coming = iter(enumerate(arrivals))
        following = next(coming, None)
        while following or self._waiting or self._doing or self._missing:
            if following and (not self._events or following[1].at <= self._events[0][0]):
                job, arrival = following
                self.now = arrival.at
                first: Stage = "denoise" if arrival.cached else "text"
                self._waiting.append(Piece(job, STAGES if self._whole else (first,)))
                following = next(coming, None)
            else:
                self.now, _, happen = heapq.heappop(self._events)
                happen()
            self._hand_out()
        return self.tally

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            piece = self._waiting.popleft()
            wanted = None if self._whole else piece.stages[0]
            gpu = next(iter(self._has[wanted]), None) if wanted else None
            if gpu is None:
                gpu = next(iter(self._idle))
            del self._idle[gpu], self._has[self._inside[gpu]][gpu]
            self._do(gpu, piece)

    def _do(self, gpu: int, piece: Piece) -> None:
        at = self.now
        for stage in piece.stages:
            swap, seconds = self._costs[gpu][stage]
            if self._whole or self._inside[gpu] != stage:
                at += swap
                self.tally.swaps, self.tally.swapping = self.tally.swaps + 1, self.tally.swapping + swap
                self._inside[gpu] = stage
            if stage == "denoise":
                self.tally.waits.append(at - self._arrivals[piece.job].at)
            at += seconds
            self.tally.busy += seconds
        self._doing[gpu] = piece, self.now, at
        self._at(at, functools.partial(self._done, gpu, self._lives[gpu]))

    def _done(self, gpu: int, life: int) -> None:
        if life != self._lives[gpu]:
            return
        piece, _, _ = self._doing.pop(gpu)
        self._rest(gpu)
        following = USUAL_NEXT[piece.stages[-1]]
        if following is None:
            self.tally.times.append((self._arrivals[piece.job].at, self.now))
        else:
            self._waiting.append(Piece(piece.job, (following,)))

    def _rest(self, gpu: int) -> None:
        self._idle[gpu] = None
        self._has[self._inside[gpu]][gpu] = None

    def _begin(self, outage: Outage) -> None:
        """Take a host's GPUs away; what they did is begun anew elsewhere once that is noticed."""
        lost = []
        for gpu in range(outage.host * self._gpus, (outage.host + 1) * self._gpus):
            self._lives[gpu] += 1
            if gpu in self._idle:
                del self._idle[gpu], self._has[self._inside[gpu]][gpu]
            elif gpu in self._doing:
                piece, begin, end = self._doing.pop(gpu)
                self.tally.again += self.now - begin
                self.tally.busy -= end - self.now
                lost.append(piece)
            self._inside[gpu] = None
        self._missing += len(lost)
        self._at(self.now + SILENCE, functools.partial(self._noticed, lost))
        self._at(outage.back, functools.partial(self._return, outage.host))

    def _noticed(self, lost: list[Piece]) -> None:
        self._missing -= len(lost)
        self._waiting.extendleft(reversed(lost))

    def _return(self, host: int) -> None:
        for gpu in range(host * self._gpus, (host + 1) * self._gpus):
            self._rest(gpu)
