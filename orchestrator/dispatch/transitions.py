"""The moves of a job: a pure function of the job and of what has happened. The engine applies what comes of it.

A job waits at a stage until a worker has its task. Each task has a number of its own (`attempt`); a stage's result
counts once. What a job leaves on the way is dropped here when nobody needs it any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.job import LiveJob
from protocol.job import JobState, StageRecord
from protocol.stages import FIRST, TRAITS, Stage

MAX_ATTEMPTS = 3  # tries of one stage at the same point
MAX_SHORTAGES = 12  # tries of one stage that found too little memory; each asks for half as much again
MAX_VISITS = 32  # of stages that bring nothing new, before a job's way is taken to go in circles
KEEP_REASONS = 16
ArtifactKind = Literal["checkpoint", "latents", "pictures"]  # of a job by its id
PARTS: tuple[ArtifactKind, ...] = ("pictures",)  # that a task has sent before its end, which go with it


# -- what may happen ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandedOut:
    """A worker gets its task."""

    worker: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """A worker that has come back has its task, which it was given before a restart."""

    worker: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepsDone:
    """Steps are done, `step` so far; `saved` of them are in a checkpoint that was kept just now, 0 if none was."""

    step: int
    saved: int = 0


@dataclass(frozen=True, slots=True)
class StageDone:
    """A visit is over. `next` is the stage to visit; None: that was the last one, and the pictures are there."""

    record: StageRecord
    next: Stage | None
    now: float  # seconds since the epoch
    visits_left: int | None = None  # as far as the worker knows


@dataclass(frozen=True, slots=True)
class EmbeddingsKnown:
    """Another job has had the same prompt: its visit of the text stage is not needed."""

    next: Stage


@dataclass(frozen=True, slots=True)
class HandedBack:
    """The task is over without a result, and nobody is to blame."""


@dataclass(frozen=True, slots=True)
class ShortOfMemory:
    """The task found too little GPU memory, and may have more next time."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt, or the wait for one, has failed; without `retry` another one can't help."""

    reason: str
    retry: bool
    now: float


@dataclass(frozen=True, slots=True)
class CheckpointDropped:
    """The stage's checkpoint is lost, or not to be trusted: it begins with its first step."""


@dataclass(frozen=True, slots=True)
class InputLost:
    """The artifact of the visit before is gone, or damaged."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    now: float


@dataclass(frozen=True, slots=True)
class Retried:
    """Somebody wants a failed or cancelled job tried again."""


@dataclass(frozen=True, slots=True)
class PicturesLost:
    """A finished job's pictures can't be read any more."""


@dataclass(frozen=True, slots=True)
class PicturesDropped:
    """A finished job's pictures had to make room for others'."""


Event = (
    HandedOut | Claimed | StepsDone | StageDone | EmbeddingsKnown | HandedBack | ShortOfMemory | Failed
    | CheckpointDropped | InputLost | Cancelled | Retried | PicturesLost | PicturesDropped
)  # fmt: skip


# -- what comes of it ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Changes:
    """The job after an event, and what is to be done besides."""

    job: LiveJob
    keep: Literal["commit", "note", "no"] = "commit"  # commit: before anybody hears; note: a crash may take it back
    drop: tuple[ArtifactKind, ...] = ()
    announce: bool = True


def after(job: LiveJob, event: Event) -> Changes:
    """Return what an event makes of a job. What can't be (a result for a job without a task) is the caller's to see."""
    match event:
        case HandedOut(worker):
            attempt = job.attempts + 1
            given = job._replace(worker=worker, attempt=attempt, attempts=attempt, step=job.saved, state=job.stage)
            return Changes(given, keep="note")
        case Claimed(worker, attempt):
            attempts = max(job.attempts, attempt)
            return Changes(job._replace(worker=worker, attempt=attempt, attempts=attempts, state=job.stage), "note")
        case StepsDone(step, saved):
            if saved > job.saved:
                return Changes(job._replace(step=step, saved=saved))
            return Changes(job._replace(step=step), keep="no")
        case StageDone():
            return _stage_done(job, event)
        case EmbeddingsKnown(following):
            record = StageRecord(
                stage="text", worker="cache", attempt=job.attempt, seconds=0.0, cached=True, kept="text"
            )  # fmt: skip
            return Changes(_visited(job, record, following, cached=True))
        case HandedBack():
            return Changes(_handed_back(job), drop=PARTS)
        case ShortOfMemory():
            return Changes(_handed_back(job, shortages=job.shortages + 1), drop=PARTS)
        case Failed():
            return _failed(job, event)
        case CheckpointDropped():
            return Changes(job._replace(saved=0), drop=("checkpoint",), announce=False)
        case InputLost():
            return Changes(_back_to_the_visit_before(job), announce=False)
        case Cancelled(now):
            return _ended(job, "cancelled", now)
        case Retried():
            return Changes(_revived(job))
        case PicturesLost():
            again = job._replace(stage=FIRST, pictures=0, records=(), visits_left=None)
            return Changes(_revived(again), drop=("pictures",))
        case PicturesDropped():
            return Changes(job._replace(pictures=0), announce=False)


def may_be_short(job: LiveJob) -> bool:
    """Return whether one more try without enough memory is no failure."""
    return job.shortages < MAX_SHORTAGES


def _stage_done(job: LiveJob, event: StageDone) -> Changes:
    if event.next is None:
        pictures = job.recipe.num_images
        return _ended(job, "done", event.now, records=(*job.records, event.record), pictures=pictures)
    if visits_in_vain((*job.records, event.record)) >= MAX_VISITS:
        reason = f"{job.stage} sends it to {event.next} again, after {MAX_VISITS} visits that brought nothing new"
        return _failed(job, Failed(reason, retry=False, now=event.now))
    over = job.saved and TRAITS[job.stage].resumes
    saved = 0 if over else job.saved
    following = _visited(
        job, event.record, event.next, visits_left=event.visits_left, state=event.next, saved=saved
    )  # fmt: skip
    return Changes(following, drop=("checkpoint",) if over else ())


def visits_in_vain(records: Sequence[StageRecord]) -> int:
    """Return how many visits there have been since one brought calls' results that there were not before."""
    most, since = -1, 0
    for record in records:
        most, since = (record.calls, 0) if record.calls > most else (most, since + 1)
    return since


def _visited(
    job: LiveJob, record: StageRecord, following: Stage, visits_left: int | None = None, **fields: Any
) -> LiveJob:
    return job._replace(
        records=(*job.records, record), stage=following, visits_left=visits_left, worker=None, failures=0,
        saved_at_failure=-1, shortages=0, **fields,
    )  # fmt: skip


def _handed_back(job: LiveJob, **fields: Any) -> LiveJob:
    """Let the stage wait again, from where it had come to."""
    return job._replace(worker=None, step=job.saved, **fields)


def _failed(job: LiveJob, event: Failed) -> Changes:
    """Count an attempt that came further than the last one as the first one again: it may not be the job's fault."""
    reasons = (*job.reasons, f"{job.stage}, attempt {job.attempt}: {event.reason}")[-KEEP_REASONS:]
    failures = (0 if job.saved > job.saved_at_failure else job.failures) + 1
    told: dict[str, Any] = {"reasons": reasons, "failures": failures, "saved_at_failure": job.saved}
    if event.retry and failures < MAX_ATTEMPTS:
        return Changes(_handed_back(job, **told), drop=PARTS)
    return _ended(job, "failed", event.now, **told)


def _ended(job: LiveJob, state: JobState, now: float, **fields: Any) -> Changes:
    """End a job; a failed one keeps its last visit's artifact, from which it may be tried again."""
    drop: tuple[ArtifactKind, ...] = ("checkpoint",) if job.saved else ()
    if state != "failed":
        drop = (*drop, "latents")
    if state != "done":
        drop = (*drop, "pictures")  # parts of them may be there
    return Changes(job._replace(state=state, finished=now, saved=0, worker=None, **fields), drop=drop)


def _back_to_the_visit_before(job: LiveJob) -> LiveJob:
    """Send a job back to the visit before: equal recipes give equal bits, so nothing is lost by doing it again."""
    *earlier, lost = job.records
    return job._replace(stage=lost.stage, records=tuple(earlier), visits_left=None)


def _revived(job: LiveJob) -> LiveJob:
    return job._replace(state="queued", finished=None, failures=0, saved_at_failure=-1)
