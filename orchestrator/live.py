"""A job while it is neither done, failed nor cancelled, and the few ways in which it may move."""

import json
from dataclasses import dataclass

from protocol.jobs import ENDED, Job, JobState, Recipe, Stage, StageRecord
from protocol.messages import WorkerHello

NEXT_STAGE: dict[Stage, Stage] = {"text": "denoise", "denoise": "vae"}


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Workers and jobs fit only if they agree in these: the same weights at the same precision, the same speedups."""

    revision: str
    dtype: str
    speedups: tuple[str, ...] = ()

    @staticmethod
    def of_recipe(recipe: Recipe) -> "ModelKey":
        return ModelKey(recipe.revision, recipe.dtype, recipe.speedups)

    @staticmethod
    def of_worker(hello: WorkerHello) -> "ModelKey":
        return ModelKey(hello.model.revision, hello.dtype, hello.speedups)


@dataclass(slots=True)
class LiveJob:
    """`stage` is the one to run next or running; `worker` is who has it in hand."""

    id: str
    number: int
    priority: int
    recipe: Recipe
    text_key: str  # of the prompt's embeddings
    request: str  # JSON of the request as it came, to recognise a repeated submission
    created: float
    state: JobState = "queued"
    stage: Stage = "text"
    attempt: int = 0
    failures: int = 0  # of the present stage
    step: int = 0
    cached: bool = False
    records: tuple[StageRecord, ...] = ()
    reasons: tuple[str, ...] = ()
    finished: float | None = None
    pictures: int = 0
    worker: str | None = None  # identity of this incarnation; never stored
    queued: float = 0.0  # monotonic seconds, when it came to wait at its stage; never stored

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def model(self) -> ModelKey:
        return ModelKey.of_recipe(self.recipe)

    @property
    def order(self) -> tuple[int, int]:
        """Place in any queue: by priority, then by age."""
        return -self.priority, self.number

    def hand_to(self, worker: str) -> None:
        self.worker = worker
        self.attempt += 1
        self.step = 0
        self.state = self.stage

    def hand_back(self) -> None:
        """The attempt is over without a result; the stage waits again."""
        self.worker = None
        self.step = 0

    def finish_stage(self, record: StageRecord) -> None:
        """Go on to the next stage, keeping how this one went."""
        self.records = (*(r for r in self.records if r.stage != record.stage), record)
        self.worker = None
        self.failures = 0
        if self.stage in NEXT_STAGE:
            self.stage = NEXT_STAGE[self.stage]
            if not record.cached:
                self.state = self.stage

    def end(self, state: JobState, now: float) -> None:
        self.state, self.finished, self.worker = state, now, None

    def view(self) -> Job:
        return Job(
            id=self.id,
            number=self.number,
            state=self.state,
            priority=self.priority,
            recipe=self.recipe,
            attempt=self.attempt,
            step=self.step,
            cached=self.cached,
            records=self.records,
            reasons=self.reasons,
            created=self.created,
            finished=self.finished,
            pictures=self.pictures,
        )

    def records_json(self) -> str:
        return json.dumps([record.model_dump() for record in self.records])


def records_from_json(text: str) -> tuple[StageRecord, ...]:
    return tuple(StageRecord(**{**record, "warnings": tuple(record["warnings"])}) for record in json.loads(text))
