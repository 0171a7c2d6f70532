"""How long tasks take by the orchestrator's own clock: what their owners are charged with, and what to expect.

A task lasts until its worker is free again, whatever became of its job: to cancel one gives back nothing of its time.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from orchestrator.job import LiveJob
from orchestrator.principal import Principal
from orchestrator.scheduling.fair_shares import FairShares
from protocol.stages import Stage

WEIGHT_OF_NEWEST = 0.2
UNKNOWN_SECONDS = 1.0
MOST_KEPT = 4096  # kinds of tasks
Kind = tuple[Stage, str, int]  # the model's revision, and pixels of all pictures in all steps


class Begun(NamedTuple):
    owner: Principal
    kind: Kind
    at: float
    expected: float  # seconds


class TaskSeconds:
    def __init__(self, shares: FairShares[Principal], clock: Callable[[], float] = time.monotonic) -> None:
        self._shares, self._clock = shares, clock
        self._mean: dict[Kind, float] = {}
        self._begun: dict[str, Begun] = {}  # by worker

    def expected(self, job: LiveJob) -> float:
        """Return the seconds that a job's present task may take."""
        return self._mean.get(kind_of(job), UNKNOWN_SECONDS)

    def lately(self, stage: Stage) -> float:
        """Return the seconds that a task of a stage may take, of whatever kind: as long as those that ended last."""
        return next((mean for kind, mean in reversed(self._mean.items()) if kind[0] == stage), UNKNOWN_SECONDS)

    def begin(self, worker: str, job: LiveJob) -> None:
        """Note that a worker has a job's task, and charge its owner."""
        self.end(worker)
        expected = self.expected(job)
        self._begun[worker] = Begun(job.owner, kind_of(job), self._clock(), expected)
        self._shares.begin(job.owner, expected)

    def done(self, worker: str) -> None:
        """Learn from a worker's task, which has come to its end."""
        if task := self._begun.get(worker):
            took = self._clock() - task.at
            mean = self._mean.pop(task.kind, took)
            self._mean[task.kind] = mean + WEIGHT_OF_NEWEST * (took - mean)
            if len(self._mean) > MOST_KEPT:
                del self._mean[next(iter(self._mean))]

    def end(self, worker: str) -> None:
        """Note that a worker is free, or gone, and charge its task's owner for the time that it took."""
        if task := self._begun.pop(worker, None):
            self._shares.correct(task.owner, self._clock() - task.at - task.expected)


def kind_of(job: LiveJob) -> Kind:
    recipe = job.recipe
    pixels = recipe.width * recipe.height * recipe.num_images * (recipe.frames or 1)
    return job.stage, recipe.revision, pixels * recipe.steps if job.stage == "denoise" else pixels
