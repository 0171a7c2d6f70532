"""A job as the orchestrator keeps it: a record that transitions replace, never change."""

import functools
import json
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.principal import LOCAL_USER, KeyHolder, LocalUser, Principal
from protocol.job import ENDED, Job, JobState, Recipe, StageRecord
from protocol.messages.worker import WorkerHello
from protocol.route import Template
from protocol.stages import FIRST, TRAITS, Stage


@dataclass(frozen=True, slots=True)
class ModelKey:
    """The key that workers and jobs must share to fit: the same weights at the same precision, the same speedups."""

    revision: str
    dtype: str
    speedups: tuple[str, ...] = ()

    @staticmethod
    def of(revision: str, dtype: str, speedups: tuple[str, ...]) -> "ModelKey":
        return _model_key(revision, dtype, speedups)

    @staticmethod
    def of_recipe(recipe: Recipe) -> "ModelKey":
        return _model_key(recipe.revision, recipe.dtype, recipe.speedups)

    @staticmethod
    def of_worker(hello: WorkerHello) -> "ModelKey":
        return _model_key(hello.model.revision, hello.dtype, hello.speedups)


@functools.lru_cache(maxsize=1024)
def _model_key(revision: str, dtype: str, speedups: tuple[str, ...]) -> ModelKey:
    """Return one object for one model: it is asked for at each move of each job."""
    return ModelKey(revision, dtype, speedups)


class LiveJob(NamedTuple):
    """`stage` is the one to visit next or now; `worker` has its task, if any worker has.

    A named tuple, since a job is made anew at each of its moves: as a frozen dataclass that cost 10 % of the jobs a
    second, and 20 % of the time to know 10,000 jobs after a restart (2026-11-25).
    """

    id: str
    number: int
    priority: int
    recipe: Recipe
    text_key: str  # of the prompt's embeddings
    request: str  # JSON of the request as it came, to recognise a repeated submission
    created: float
    state: JobState = "queued"
    stage: Stage = FIRST
    attempt: int = 0  # number of the present task, or of the last one
    attempts: int = 0  # the highest number that any task of it had
    failures: int = 0  # of the present stage, since it last came further
    saved: int = 0  # steps in its checkpoint
    owner: Principal = LOCAL_USER
    step: int = 0
    cached: bool = False
    records: tuple[StageRecord, ...] = ()  # its visits so far
    reasons: tuple[str, ...] = ()
    finished: float | None = None
    pictures: int = 0
    # Never stored:
    worker: str | None = None  # identity of this incarnation
    visits_left: int | None = None  # this stage's included, as the last result has told
    template: Template | None = None  # what it is a kind of; unknown after a restart
    saved_at_failure: int = -1
    shortages: int = 0  # tries of the present stage that found too little memory

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def waits(self) -> bool:
        """Return whether it is in a queue, or waits for a moment before it is tried again."""
        return self.worker is None and not self.ended

    @property
    def model(self) -> ModelKey:
        return ModelKey.of_recipe(self.recipe)

    @property
    def distance(self) -> int:
        """Visits to its end, the present one included."""
        return TRAITS[self.stage].distance if self.visits_left is None else self.visits_left

    @property
    def order(self) -> tuple[int, int, int]:
        """Place in any queue: by priority, then nearest to the end first, then by age."""
        return -self.priority, self.distance, self.number

    @property
    def own_id(self) -> str:
        """Its id as its owner has given it, see `job_id_of`."""
        given = json.loads(self.request).get("id") if isinstance(self.owner, KeyHolder) else None
        return given or self.id

    def id_for(self, principal: Principal) -> str:
        """Return its id as a principal that may see it knows it."""
        return self.id if isinstance(principal, LocalUser) else self.own_id

    def view(self, principal: Principal = LOCAL_USER) -> Job:
        return Job(
            id=self.id_for(principal), number=self.number, state=self.state, priority=self.priority, recipe=self.recipe,
            attempt=self.attempt, step=self.step, cached=self.cached, records=self.records, reasons=self.reasons,
            created=self.created, finished=self.finished, pictures=self.pictures,
        )  # fmt: skip

    def records_json(self) -> str:
        return json.dumps([record.model_dump() for record in self.records])


def records_from_json(text: str) -> tuple[StageRecord, ...]:
    return tuple(StageRecord(**{**record, "warnings": tuple(record["warnings"])}) for record in json.loads(text))
