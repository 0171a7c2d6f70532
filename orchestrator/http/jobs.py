"""Triptych's own API: jobs with their events and results, and the stack that makes them."""

import asyncio
import io
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.http.asking import (
    Caller,
    Http,
    Wanted,
    Who,
    check_takes,
    file_of,
    id_of,
    loras_of,
    model_known,
    pixels_of,
)
from orchestrator.http.results import MEDIA, file_answers, file_response
from orchestrator.http.waiting import SSE, event, stream
from protocol.client.input_pictures import Inputs
from protocol.client.picture_files import read_recipe
from protocol.job import ENDED, MAX_IMAGES_IN, UNFINISHED, Job, JobRequest, JobState
from protocol.lora import MAX_LORAS, LoraInfo
from protocol.messages.client import JobEvent
from protocol.model import ModelDescription
from protocol.views import GpuView, ModelView, ProcessView, WorkerView

router = APIRouter(prefix="/api", tags=["Triptych"])

JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Text = Annotated[str, Field(max_length=100_000)]
File = Annotated[str, Field(description="A file as base64, or as a data URL.")]


class NewJob(BaseModel):
    """A prompt and the settings of its picture; what is left out is as the model has it."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: Text
    model: Annotated[str, Field(max_length=256)] | None = None
    controlnet: Annotated[str, Field(max_length=256)] | None = None
    refiner: Annotated[str, Field(max_length=256)] | None = None
    negative_prompt: Text | None = None
    width: Int64 | None = Field(None, description="pixels")
    height: Int64 | None = Field(None, description="pixels")
    steps: Int64 | None = None
    guidance: float | None = Field(None, description="of models that take it as an input")
    cfg_scale: float | None = Field(None, description="true classifier-free guidance")
    seed: Int64 | None = None
    num_images: Int64 = Field(1, description="pictures, or videos")
    max_sequence_length: Int64 | None = Field(None, description="tokens")
    frames: Int64 | None = Field(None, description="of a video")
    fps: float | None = Field(None, description="of a video")
    images: Annotated[list[File], Field(max_length=MAX_IMAGES_IN)] = []
    mask: File | None = Field(None, description="White where the picture is made anew.")
    mask_blur: Annotated[float, Field(ge=0, le=1000)] = 0
    control: File | None = None
    ip_image: File | None = None
    ip_scale: float | None = None
    video: File | None = None
    strength: float | None = None
    settings: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], Text | bool | Int64 | float],
        Field(max_length=64),
    ] = {}
    loras: Annotated[list[str], Field(max_length=MAX_LORAS, description="NAME or NAME@WEIGHT")] = []
    priority: Int64 = 0
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None


class StackInfo(BaseModel):
    version: str
    started: float = Field(description="seconds since the epoch")
    counts: dict[JobState, int] = Field(description="jobs by state")
    queue_limit: int
    model: ModelDescription | None = Field(description="the default one")


class Processes(BaseModel):
    workers: list[WorkerView]
    processes: list[ProcessView]
    drained: list[str]


class Load(BaseModel):
    """A worker's part of a GPU, in bytes."""

    worker: str
    stage: str
    model: str
    lease: int
    context: int
    weights: int = Field(description="that lie there")
    streamed: int = Field(description="that pass through from the host's memory at each pass")


class Gpu(BaseModel):
    gpu: GpuView
    loads: list[Load]


# -- jobs ---------------------------------------------------------------------------------------


@router.post("/jobs", status_code=HTTPStatus.CREATED)
async def submit(new: NewJob, who: Who, idempotency_key: Annotated[str | None, Header()] = None) -> Job:
    """Submit a job. It is on disk when this answers; the same request with the same id again is the same job."""
    model = model_known(await who.models(new.model), new.model)
    fields = new.model_dump(
        exclude={"images", "mask", "mask_blur", "control", "ip_image", "video", "settings", "loras", "id"}
    )
    check_takes(model, bool(new.images), new.mask is not None, new.video is not None)
    inputs = await inputs_of(who.http, new)
    request = JobRequest(
        **fields, **inputs.fields, settings=tuple((name, as_text(value)) for name, value in new.settings.items()),
        loras=loras_of(new.loras), id=id_of(new.id, idempotency_key),
    )  # fmt: skip
    return (await Wanted([request], inputs.tensors).submit(who.client, watch=False))[0]


def as_text(value: str | bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


async def inputs_of(http: Http, new: NewJob) -> Inputs:
    """Return the pixels of all that a job begins from; BadField, BadRequest."""
    images = [file_of(image, "images") for image in new.images]
    mask, control, ip_image, video = (
        file_of(file, name) if (file := getattr(new, name)) else None
        for name in ("mask", "control", "ip_image", "video")
    )
    return await pixels_of(http, images, mask, new.mask_blur, control=control, ip_image=ip_image, video=video)


@router.get("/jobs")
async def jobs(
    who: Who,
    state: Annotated[list[JobState], Query()] = [],  # noqa: B006
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Job]:
    """List the newest jobs, newest first."""
    return await who.client.jobs(state, limit)


@router.get("/queue")
async def queue(who: Who, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[Job]:
    """List unfinished jobs, the oldest of the newest ones first."""
    return (await who.client.jobs(UNFINISHED, limit))[::-1]


@router.get("/jobs/{job_id}")
async def job(job_id: JobId, who: Who) -> Job:
    """Show a job as it stands."""
    return await who.client.job(job_id)


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: JobId, who: Who) -> Job:
    """End a job; a worker that has its task stops at its next step."""
    return (await who.client.cancel(job_id))[0]


@router.post("/jobs/{job_id}/retry")
async def retry(job_id: JobId, who: Who) -> Job:
    """Run a failed or cancelled job again, from its last finished stage."""
    return (await who.client.retry(job_id))[0]


EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {SSE: {"schema": {"type": "string"}}}, "description": "Events until the job ends."},
    204: {"description": "The job has ended, and whoever asks has heard so."},
}


@router.get("/jobs/{job_id}/events", response_class=Response, responses=EVENTS)
async def events(
    request: Request, job_id: JobId, who: Who, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Send a job's events as they come, first how it stands; with Last-Event-ID only if that has changed."""
    found = await who.client.job(job_id)
    if found.state in ENDED and last_event_id == found.state:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return stream(request, moving(who, job_id, last_event_id))


async def moving(who: Caller, job_id: str, heard: str | None) -> AsyncIterator[bytes]:
    async for change in who.client.events([job_id]):
        number = number_of(change)
        if number != heard:
            yield event(change.model_dump(mode="json"), number=number)
        heard = number


def number_of(change: JobEvent) -> str:
    """Return what tells an event of a job from the others; an ended job's last one has its state alone."""
    if change.state in ENDED:
        return change.state
    return f"{change.state}-{change.step}-{change.queue_position}-{int(change.running)}"


Suffix = Annotated[Literal["png", "jpeg", "jpg", "webp", "gif", "mp4", "webm"], Path()]
FILE = file_answers(set(MEDIA.values()))


@router.get("/jobs/{job_id}/results/{index}.{suffix}", response_class=Response, responses=FILE)
async def result(
    request: Request, job_id: JobId, index: Annotated[int, Path(ge=0, le=10_000)], suffix: Suffix, who: Who
) -> Response:
    """Send one of a job's pictures or videos, counted from 0, with its recipe in it."""
    file, tag = await who.http.results.file(who.client, who.key, job_id, index, suffix)
    return file_response(request, file, suffix, tag)


router.add_api_route("/jobs/{job_id}/results/{index}.{suffix}", result, methods=["HEAD"], include_in_schema=False)
PREVIEW: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
    204: {"description": "There is none now."},
}


@router.get("/jobs/{job_id}/preview.jpg", response_class=Response, responses=PREVIEW)
async def preview(job_id: JobId, who: Who) -> Response:
    """Send how a job's picture will look, by what is known now; whoever asks again has newer ones made."""
    found = await who.client.preview(job_id)
    if not found.file:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    headers = {"Cache-Control": "no-store", "X-Triptych-Step": str(found.step)}
    return Response(found.file, media_type="image/jpeg", headers=headers)


# -- the stack ----------------------------------------------------------------------------------


@router.get("/stack")
async def stack(who: Who) -> StackInfo:
    """Show the stack's version, how many jobs stand where, and its default model's parameters."""
    found = await who.client.stack()
    return StackInfo(
        version=found.version, started=found.started, counts=dict(found.counts), queue_limit=found.queue_limit,
        model=found.model,
    )  # fmt: skip


@router.get("/workers")
async def workers(who: Who) -> Processes:
    """List workers, and for the stack's own user all of its processes."""
    found = await who.client.workers()
    return Processes(workers=list(found.workers), processes=list(found.processes), drained=list(found.drained))


@router.get("/gpus")
async def gpus(who: Who) -> list[Gpu]:
    """List the GPUs that the stack leases to workers, each with who holds what of it."""
    found, models = await who.client.workers(), await who.client.models()
    return [
        Gpu(gpu=gpu, loads=[load_of(worker, gpu.index, models) for worker in found.workers if gpu.has(worker)])
        for gpu in found.gpus
    ]


def load_of(worker: WorkerView, gpu: int, models: list[ModelView]) -> Load:
    place = worker.gpus.index(gpu)
    lease = worker.lease_bytes[place] if place < len(worker.lease_bytes) else 0
    context = worker.context_bytes[place] if place < len(worker.context_bytes) else 0
    there = sum(part.device_bytes for part in worker.residency)
    passing = sum(part.total_bytes - part.device_bytes for part in worker.residency if part.state == "streamed")
    same = [m.name for m in models if (m.revision, m.speedups) == (worker.revision, worker.speedups)]
    return Load(
        worker=worker.name, stage=worker.stage, model=same[0] if same else worker.model, lease=lease, context=context,
        weights=there, streamed=max(0, passing),
    )  # fmt: skip


@router.get("/models")
async def models(who: Who) -> list[ModelView]:
    """List the stack's models with the parameters that each takes, the default one first."""
    return await who.client.models()


@router.post("/models/{name:path}/load", status_code=HTTPStatus.NO_CONTENT)
async def load(name: str, who: Who) -> None:
    """Start a model's workers. For the stack's own user."""
    await who.client.load_model(name)


@router.post("/models/{name:path}/unload", status_code=HTTPStatus.NO_CONTENT)
async def unload(name: str, who: Who) -> None:
    """End a model's workers until a job asks for it. For the stack's own user."""
    await who.client.load_model(name, load=False)


@router.get("/loras")
async def loras(who: Who, model: Annotated[str | None, Query(max_length=256)] = None) -> list[LoraInfo]:
    """List the LoRAs that have a name in the stack."""
    return await who.client.loras(model)


class Recipe(BaseModel):
    """The making of a picture, as its file says."""

    recipe: dict[str, Any]
    index: int


class PictureIn(BaseModel):
    image: File


@router.post("/recipe")
async def recipe(given: PictureIn) -> Recipe:
    """Read the recipe that a picture carries which Triptych made."""
    made = await asyncio.to_thread(read_recipe, io.BytesIO(file_of(given.image, "image")))
    return Recipe(recipe=made.recipe.model_dump(mode="json"), index=made.index)
