"""How long tasks take by the orchestrator's own clock: what their owners are charged with, and what to expect."""

import time
from collections.abc import Callable

from orchestrator.job import LiveJob
from protocol.stages import Stage

WEIGHT_OF_NEWEST = 0.2
UNKNOWN_SECONDS = 1.0
MOST_KEPT = 4096  # kinds of tasks
Kind = tuple[Stage, str, int]  # the model's revision, and pixels of all pictures in all steps


class TaskSeconds:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mean: dict[Kind, float] = {}
        self._begun: dict[str, tuple[float, float]] = {}  # by job: when, and the seconds that were expected

    def expected(self, job: LiveJob) -> float:
        """Return the seconds that a job's present task may take."""
        return self._mean.get(kind_of(job), UNKNOWN_SECONDS)

    def begin(self, job: LiveJob) -> float:
        """Note that a job's task is handed out; return the seconds that are expected of it."""
        seconds = self.expected(job)
        self._begun[job.id] = self._clock(), seconds
        return seconds

    def end(self, job: LiveJob) -> float:
        """Note that it is over, whatever came of it; return the seconds that it took longer than was expected."""
        begun, expected = self._begun.pop(job.id, (self._clock(), 0.0))
        took, kind = self._clock() - begun, kind_of(job)
        mean = self._mean.pop(kind, took)
        self._mean[kind] = mean + WEIGHT_OF_NEWEST * (took - mean)
        if len(self._mean) > MOST_KEPT:
            del self._mean[next(iter(self._mean))]
        return took - expected


def kind_of(job: LiveJob) -> Kind:
    recipe = job.recipe
    pixels = recipe.width * recipe.height * recipe.num_images * (recipe.frames or 1)
    return job.stage, recipe.revision, pixels * recipe.steps if job.stage == "denoise" else pixels
