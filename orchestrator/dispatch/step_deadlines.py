"""Deadlines of a task's steps, learned as steps come; and the workers that have been at one for too long."""

import time
from collections.abc import Callable, Iterable

from orchestrator.dispatch.fleet import Worker
from orchestrator.job import ModelKey
from protocol.job import Recipe
from protocol.stages import Stage

FACTOR = 20.0  # of the longest that was ever seen
LEAST_SECONDS = 60.0
MOST_STEPS, LEAST_STEPS = 4, 16  # that are believed: schedulers of higher orders make several of one
LENT_SECONDS = 60.0  # that what a worker has lent may be in nobody's hands and not be free
Key = tuple[Stage, ModelKey, int]  # pixels of all pictures of a job


class StepDeadlines:
    def __init__(self, unknown: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`unknown`: seconds that a step may take of which nothing is known, or the first task of a process."""
        self._unknown, self._clock = unknown, clock
        self._longest: dict[Key, float] = {}

    @staticmethod
    def key(stage: Stage, recipe: Recipe) -> Key:
        return stage, ModelKey.of_recipe(recipe), recipe.width * recipe.height * recipe.num_images

    def moved(self, worker: Worker, recipe: Recipe, step: int) -> None:
        """Note that a worker has come to a step of its task, unless it tells of more steps than any task has."""
        now = self._clock()
        if worker.task and worker.step < step <= MOST_STEPS * max(recipe.steps, LEAST_STEPS):
            key = self.key(worker.task.stage, recipe)
            took = (now - worker.moved) / (step - worker.step)
            if not worker.process.key:  # a key's worker is as slow as it likes
                self._longest[key] = max(took, self._longest.get(key, 0.0))
            worker.step, worker.moved = step, now

    def overdue(self, workers: Iterable[Worker]) -> list[tuple[Worker, float]]:
        """Workers that have shown no progress for too long, and for how many seconds.

        One that lends comes no further while others work on its GPUs.
        """
        now, everybody = self._clock(), list(workers)
        used = {gpu for worker in everybody if occupied(worker) and not worker.loan for gpu in worker.gpus}
        for worker in everybody:
            if worker.loan == "given" and used & {*worker.gpus}:
                worker.moved = now
        return [
            (worker, now - worker.moved)
            for worker in everybody
            if (worker.loan or occupied(worker)) and now - worker.moved > self._limit(worker)
        ]

    def _limit(self, worker: Worker) -> float:
        if worker.loan == "given":
            return LENT_SECONDS
        known = self._longest.get(worker.pace) if worker.pace else None
        if known is None or worker.done == 0:
            return self._unknown
        return min(self._unknown, max(LEAST_SECONDS, FACTOR * known))


def occupied(worker: Worker) -> bool:
    return worker.state in ("busy", "swapping")
