"""Transitions are pure: whatever happens in whatever order, a job waits, has a task or has ended, and loses nothing."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.transitions import (
    KEEP_REASONS,
    MAX_ATTEMPTS,
    MAX_SHORTAGES,
    MAX_VISITS,
    Cancelled,
    CheckpointDropped,
    Claimed,
    EmbeddingsKnown,
    Event,
    Failed,
    HandedBack,
    HandedOut,
    InputLost,
    PicturesDropped,
    PicturesLost,
    Retried,
    ShortOfMemory,
    StageDone,
    StepsDone,
    after,
    may_be_short,
)
from orchestrator.job import LiveJob
from protocol.job import StageRecord
from protocol.stages import STAGES, Stage
from tests.chance import examples
from tests.orchestrator.storage.test_job_store import job as stored_job


def record(stage: Stage) -> StageRecord:
    return StageRecord(stage=stage, worker="w", attempt=1, seconds=1.0)


def fresh() -> LiveJob:
    return stored_job(1)


def at(stage: Stage, *visited: Stage, **fields: object) -> LiveJob:
    return fresh()._replace(stage=stage, state=stage, records=tuple(map(record, visited)), **fields)


def possible(job: LiveJob) -> list[Event]:
    """What the engine may tell of a job as it is."""
    if job.ended:
        again: list[Event] = [Retried()] if job.state != "done" else [PicturesLost(), PicturesDropped()]
        return again
    always: list[Event] = [Cancelled(9.0), Failed("why", True, 9.0), Failed("why", False, 9.0)]
    if job.worker is None:
        waiting: list[Event] = [HandedOut("w"), Claimed("w", job.attempt + 1)]
        waiting += [EmbeddingsKnown("denoise")] if job.stage == "text" else []
        return always + waiting + ([InputLost()] if job.records else [])
    working: list[Event] = [StepsDone(3), StepsDone(4, saved=job.saved + 1), HandedBack(), ShortOfMemory()]
    working += [StageDone(record(job.stage), following, 9.0) for following in (*STAGES, None)]
    return always + working + ([CheckpointDropped()] if job.saved else [])


@examples(100)
@given(data=st.data())
def test_whatever_happens_a_job_stays_whole(data: st.DataObject) -> None:
    job = fresh()
    for _ in range(30):
        event = data.draw(st.sampled_from(possible(job)))
        changes = after(job, event)
        assert after(job, event) == changes
        now = changes.job
        assert now.waits + (now.worker is not None) + now.ended == 1
        assert now.ended == (now.finished is not None)
        assert now.attempts >= job.attempts
        assert now.attempt <= now.attempts
        assert len(now.reasons) <= KEEP_REASONS
        assert now.failures <= MAX_ATTEMPTS
        assert (now.pictures > 0) <= (now.state == "done")
        assert now.step >= now.saved or now.stage != job.stage or isinstance(event, StepsDone)
        if now.saved < job.saved:
            assert "checkpoint" in changes.drop
        if now.state == "failed":
            assert "latents" not in changes.drop
            assert now.reasons
        if changes.keep != "commit":
            assert (now.records, now.state in ("done", "failed")) == (job.records, False)
        job = now


def test_the_usual_way_of_a_job() -> None:
    job = after(fresh(), HandedOut("w")).job
    assert (job.state, job.attempt, job.worker) == ("text", 1, "w")
    job = after(job, StageDone(record("text"), "denoise", 1.0)).job
    assert (job.state, job.stage, job.worker, job.distance) == ("denoise", "denoise", None, 2)
    job = after(job, HandedOut("w")).job
    saved = after(job, StepsDone(5, saved=4))
    assert (saved.keep, saved.job.saved, saved.job.step) == ("commit", 4, 5)
    assert after(job, StepsDone(5)).keep == "no"
    done = after(saved.job, StageDone(record("denoise"), "vae", 2.0))
    assert (done.job.stage, done.job.saved, done.drop) == ("vae", 0, ("checkpoint",))
    last = after(after(done.job, HandedOut("w")).job, StageDone(record("vae"), None, 3.0))
    assert (last.job.state, last.job.finished, last.drop) == ("done", 3.0, ("latents",))
    assert last.job.pictures == last.job.recipe.num_images
    assert [r.stage for r in last.job.records] == ["text", "denoise", "vae"]


def test_a_stage_may_be_visited_again_and_a_result_knows_how_far_it_is() -> None:
    job = after(at("vae", worker="w"), StageDone(record("vae"), "text", 1.0, visits_left=4)).job
    assert (job.stage, job.distance, [r.stage for r in job.records]) == ("text", 4, ["vae"])
    job = after(job._replace(worker="w"), StageDone(record("text"), "vae", 1.0, visits_left=3)).job
    assert (job.stage, job.distance, len(job.records)) == ("vae", 3, 2)


def test_a_way_that_goes_in_circles_ends_with_the_reason() -> None:
    job = at("denoise", *(["text", "denoise"] * (MAX_VISITS // 2)), worker="w")
    ended = after(job, StageDone(record("denoise"), "text", 1.0)).job
    assert ended.state == "failed"
    assert "after 32 visits" in ended.reasons[-1]
    fruitful = [record("vae").model_copy(update={"calls": number}) for number in range(2 * MAX_VISITS)]
    goes_on = job._replace(records=tuple(fruitful))
    assert not after(goes_on, StageDone(record("denoise"), "text", 1.0)).job.ended


def test_three_failures_at_the_same_point_end_a_job_and_progress_begins_anew() -> None:
    job = at("denoise", "text", worker="w")
    for number in range(1, MAX_ATTEMPTS):
        job = after(job, Failed("hiccup", True, 1.0)).job._replace(worker="w")
        assert (job.failures, job.ended) == (number, False)
    further = after(job, StepsDone(2, saved=2)).job
    once_more = after(further, Failed("hiccup", True, 1.0)).job
    assert (once_more.failures, once_more.ended, once_more.step) == (1, False, 2)
    assert after(job, Failed("hiccup", True, 1.0)).job.state == "failed"
    assert after(job, Failed("NaN", False, 1.0)).job.reasons[-1] == "denoise, attempt 0: NaN"


def test_a_checkpoint_of_denoising_outlives_a_way_back_to_the_prompt() -> None:
    lost = after(at("denoise", "text", saved=7), InputLost())
    assert (lost.job.stage, lost.job.records, lost.job.saved, lost.announce) == ("text", (), 7, False)
    again = after(lost.job._replace(worker="w"), StageDone(record("text"), "denoise", 1.0))
    assert (again.job.saved, again.drop) == (7, ())


def test_shortages_are_bounded_and_forgotten_with_the_stage() -> None:
    job = at("denoise", "text", worker="w")
    for _ in range(MAX_SHORTAGES):
        assert may_be_short(job)
        job = after(job, ShortOfMemory()).job._replace(worker="w")
    assert not may_be_short(job)
    assert not job.failures
    assert may_be_short(after(job, StageDone(record("denoise"), "vae", 1.0)).job)


def test_a_prompt_seen_before_is_a_visit_that_took_no_time() -> None:
    job = after(fresh(), EmbeddingsKnown("denoise")).job
    assert (job.state, job.stage, job.cached, job.records[0].cached) == ("queued", "denoise", True, True)


def test_a_job_tried_again_goes_on_and_one_whose_pictures_are_lost_begins_anew() -> None:
    failed = at("vae", "text", "denoise", finished=1.0, failures=3)
    retried = after(failed._replace(state="failed"), Retried()).job
    assert (retried.state, retried.stage, retried.failures, retried.finished) == ("queued", "vae", 0, None)
    done = at("vae", "text", "denoise", "vae", pictures=2, finished=1.0)._replace(state="done")
    lost = after(done, PicturesLost()).job
    assert (lost.state, lost.stage, lost.records, lost.pictures) == ("queued", "text", (), 0)
    assert after(done, PicturesDropped()).job == done._replace(pictures=0)
