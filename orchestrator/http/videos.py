"""Videos in the shape of OpenAI's /v1/videos: jobs that are asked after, not waited for."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from orchestrator.http.asking import (
    Caller,
    Wanted,
    Who,
    check_takes,
    either_body,
    file_of,
    id_of,
    model_named,
    pixels_of,
    size_of,
)
from orchestrator.http.faults import BadField, fault_in_body
from orchestrator.http.results import file_answers, file_response
from protocol.client.input_pictures import Inputs
from protocol.errors import BadRequest, NotFound
from protocol.job import ENDED, Job, JobRequest, JobState
from protocol.model import VideoTask
from protocol.views import ModelView

router = APIRouter(prefix="/v1/videos", tags=["OpenAI"])
STATUSES: dict[JobState, str] = {"queued": "queued", "done": "completed", "failed": "failed", "cancelled": "failed"}


class NewVideo(BaseModel):
    """A request for a video; fields after `input_reference` are Triptych's own."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=100_000)]
    model: str | None = None
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    size: str | None = None
    input_reference: str | None = Field(None, description="A picture to begin from: a file; in JSON base64.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    negative_prompt: Annotated[str, Field(max_length=100_000)] | None = None
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None


class VideoFault(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    id: str
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="from 0 to 100")
    created_at: int
    completed_at: int | None
    model: str
    seconds: str
    size: str
    error: VideoFault | None
    warnings: list[str] = Field([], description="Where something was taken otherwise than it was asked for.")


class Videos(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool


@router.post("", response_model=Video, openapi_extra=either_body(NewVideo))
async def create(request: Request, who: Who, idempotency_key: Annotated[str | None, Header()] = None) -> Video:
    """Submit a video."""
    given, image = await read(request)
    told: list[str] = []
    model = model_named(await who.models(given.model), given.model, told)
    task = model.description.video
    if task is None:
        raise BadRequest(f"{model.name} makes pictures, no videos.", "POST /v1/images/generations makes them.")
    check_takes(model, image is not None, mask=False)
    inputs = await pixels_of(who.http, [image]) if image else Inputs()
    width, height = size_of(given.size or "auto")
    fps = given.fps or task.fps
    job = JobRequest(
        prompt=given.prompt, model=model.name or None, width=width, height=height, steps=given.steps, seed=given.seed,
        negative_prompt=given.negative_prompt, fps=given.fps, frames=frames_for(task, given.seconds, fps),
        id=id_of(given.id, idempotency_key), **inputs.fields,
    )  # fmt: skip
    (accepted,) = await Wanted([job], inputs.tensors).submit(who.client, watch=False)
    return view(accepted, model, told)


async def read(request: Request) -> tuple[NewVideo, bytes | None]:
    """Return a request, and the file of the picture that it begins from; BadRequest."""
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            given = NewVideo.model_validate_json(await request.body())
            return given, file_of(given.input_reference, "input_reference") if given.input_reference else None
        async with request.form(max_files=1, max_fields=32, max_part_size=400_000) as form:
            file = form.get("input_reference")
            if isinstance(file, str):
                raise BadField("input_reference", "input_reference is no file.", "Send it as a file of the form.")
            image = await file.read() if isinstance(file, UploadFile) else None
            fields = {name: value for name, value in form.items() if isinstance(value, str) and value}
        return NewVideo.model_validate(fields), image
    except ValidationError as error:
        raise fault_in_body(error) from None


def frames_for(task: VideoTask, seconds: float | None, fps: float) -> int | None:
    """Return the number of frames nearest to so many seconds that a model can make; None: its own."""
    if seconds is None:
        return None
    steps = round((seconds * fps - task.frames) / task.multiple)
    lowest = -((task.frames - 1) // task.multiple)
    return min(task.max_frames, task.frames + max(lowest, steps) * task.multiple)


def view(job: Job, model: ModelView | None, told: list[str]) -> Video:
    """Return a job as clients of videos read it."""
    recipe, status = job.recipe, STATUSES.get(job.state, "in_progress")
    done = 100 if job.state == "done" else min(99, 100 * job.step // max(1, recipe.steps))
    reason = job.reasons[-1] if job.reasons else f"It was {job.state}."
    failed = VideoFault(code=f"job_{job.state}", message=reason) if status == "failed" else None
    return Video.model_validate(
        {
            "id": job.id, "status": status, "progress": done, "created_at": int(job.created),
            "completed_at": None if job.finished is None else int(job.finished),
            "model": model.name if model else recipe.model.rpartition("/")[2],
            "seconds": f"{(recipe.frames or 0) / (recipe.fps or 1):g}", "size": f"{recipe.width}x{recipe.height}",
            "error": failed, "warnings": told,
        }
    )  # fmt: skip


async def found(who: Caller, name: str) -> Job:
    """Return the job of a video; NotFound, also of one that makes pictures."""
    job = await who.client.job(name)
    if job.recipe.frames is None:
        raise NotFound(f"Job {name} makes pictures, no video.", f"GET /api/jobs/{name}")
    return job


@router.get("")
async def videos(who: Who, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Videos:
    """List the newest videos."""
    return Videos(data=[view(job, None, []) for job in await who.client.jobs(limit=limit) if job.recipe.frames])


@router.get("/{video_id}")
async def video(video_id: str, who: Who) -> Video:
    """Show how a video stands."""
    return view(await found(who, video_id), None, [])


@router.get("/{video_id}/content", response_class=Response, responses=file_answers({"video/mp4"}))
async def content(request: Request, video_id: str, who: Who) -> Response:
    """Send a video's file."""
    await found(who, video_id)
    file, tag = await who.http.results.file(who.client, who.key, video_id, 0, "mp4")
    return file_response(request, file, "mp4", tag)


@router.delete("/{video_id}")
async def delete(video_id: str, who: Who) -> Deleted:
    """Cancel a video that is not made yet. Those that are made are kept as pictures are, the oldest going first."""
    job = await found(who, video_id)
    if job.state not in ENDED:
        await asyncio.shield(who.client.cancel(video_id))
    return Deleted(id=video_id, deleted=job.state not in ENDED)
