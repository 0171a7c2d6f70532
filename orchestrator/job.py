"""A job while it is neither done, failed nor cancelled, and the few ways in which it may move."""

import json
from dataclasses import dataclass

from protocol.job import ENDED, Job, JobState, Recipe, StageRecord
from protocol.messages.worker import WorkerHello
from protocol.stages import Stage

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
    attempt: int = 0  # the task that is in hand, or was last
    attempts: int = 0  # the highest number that any task of it had
    failures: int = 0  # of the present stage, since it last came further
    saved: int = 0  # steps in its checkpoint
    owner: str = ""  # name of the client's key; empty for this machine's own user
    step: int = 0
    cached: bool = False
    records: tuple[StageRecord, ...] = ()
    reasons: tuple[str, ...] = ()
    finished: float | None = None
    pictures: int = 0
    worker: str | None = None  # identity of this incarnation; never stored
    saved_at_failure: int = -1  # never stored
    shortages: int = 0  # tries of the present stage that found too little memory; never stored
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
        self.attempts += 1
        self.attempt = self.attempts
        self.step = self.saved
        self.state = self.stage

    def claimed_by(self, worker: str, attempt: int) -> None:
        """A worker has this stage in hand that was given it before a restart."""
        self.worker, self.attempt, self.state = worker, attempt, self.stage
        self.attempts = max(self.attempts, attempt)

    def hand_back(self) -> None:
        """The attempt is over without a result; the stage waits again, from where it had come to."""
        self.worker = None
        self.step = self.saved

    def count_failure(self) -> None:
        """One that came further than the last is the first one again: it may not be the job's fault."""
        if self.saved > self.saved_at_failure:
            self.failures = 0
        self.failures, self.saved_at_failure = self.failures + 1, self.saved

    def finish_stage(self, record: StageRecord) -> None:
        """Go on to the next stage, keeping how this one went."""
        self.records = (*(r for r in self.records if r.stage != record.stage), record)
        self.worker = None
        self.failures, self.saved_at_failure, self.shortages = 0, -1, 0
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
