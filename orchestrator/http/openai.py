"""OpenAI's Images API: /v1/images/generations and /v1/images/edits, and /v1/models."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from orchestrator.http.asking import (
    Caller,
    Wanted,
    Who,
    check_takes,
    either_body,
    file_of,
    id_of,
    loras_of,
    model_known,
    model_named,
    pixels_of,
    size_of,
    spread,
)
from orchestrator.http.faults import BadField, body_of, error_of, fault_in_body
from orchestrator.http.results import enlarged, text_of
from orchestrator.http.waiting import answer, done, event, stream
from orchestrator.settings import Quality
from protocol.client.input_pictures import Inputs
from protocol.errors import BadRequest
from protocol.job import MAX_IMAGES_IN, Job, JobRequest
from protocol.lora import MAX_LORAS
from protocol.views import ModelView

router = APIRouter(prefix="/v1", tags=["OpenAI"])

MOST_PICTURES = 10  # of a request
FEW_STEPS = 8  # a model that needs so few has none to spare
BYTES_A_TOKEN = 4  # of text, about
PATCH = 16  # pixels at the edge of what counts as a token of a picture
EFFORTS = {"standard": "high", "hd": "high", "auto": "high"}  # other words for quality
Format = Literal["png", "jpeg", "webp"]


def listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class ImageOptions(BaseModel):
    """The fields that generations and edits have in common; those after `response_format` are Triptych's own."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=100_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: str | None = None
    quality: str | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    negative_prompt: Annotated[str, Field(max_length=100_000)] | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    loras: Annotated[list[str], BeforeValidator(listed), Field(max_length=MAX_LORAS)] = Field(
        default_factory=list, description="NAME or NAME@WEIGHT"
    )
    strength: float | None = None
    controlnet: Annotated[str, Field(max_length=256)] | None = None
    refiner: Annotated[str, Field(max_length=256)] | None = None
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")] | None = Field(
        None, description="The job's id: the same request with it again is the same job."
    )

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def suffix(self) -> Format:
        return self.output_format or "png"


class Generation(ImageOptions):
    """A request for pictures of a prompt."""


class Edit(ImageOptions):
    """A request for pictures of pictures: multipart with files, or JSON with data URLs."""

    image: Annotated[list[str], BeforeValidator(listed), Field(max_length=MAX_IMAGES_IN)] = Field(
        default_factory=list, description="Files; in JSON base64 or data URLs."
    )
    mask: str | None = Field(None, description="A file: clear, or where it has no alpha white, is made anew.")
    input_fidelity: Literal["low", "high"] | None = None


class Picture(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Estimates: text at four bytes a token, pictures at a token for 16 x 16 pixels."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class Images(BaseModel):
    created: int
    data: list[Picture]
    background: str = "opaque"
    output_format: str
    quality: str
    size: str
    usage: Usage
    model: str = Field(description="The model that made them.")
    jobs: list[str] = Field(description="Their ids, for /api/jobs.")
    warnings: list[str] = Field(description="Where something was taken otherwise than it was asked for.")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "triptych"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
async def models(who: Who) -> ModelList:
    """List the stack's models."""
    return ModelList(data=[Model(id=model.name) for model in await who.models()])


@router.get("/models/{name:path}")
async def model(name: str, who: Who) -> Model:
    """Show one of the stack's models."""
    return Model(id=model_known(await who.models(name), name).name)


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Or events, with `stream`."}
}


@router.post("/images/generations", response_model=Images, responses=STREAMED)
async def generations(
    request: Request,
    given: Generation,
    who: Who,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Make pictures of a prompt."""
    return await respond(request, who, given, Inputs(), id_of(given.id, idempotency_key), "image_generation")


@router.post("/images/edits", response_model=Images, responses=STREAMED, openapi_extra=either_body(Edit))
async def edits(
    request: Request,
    who: Who,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Make pictures of pictures: change them, or repaint a part of one."""
    given, images, mask = await read_edit(request)
    if not images:
        raise BadField("image", "There is no image.", "Send one as image, or several as image[].")
    inputs = await pixels_of(who.http, images, mask, alpha=True)
    return await respond(request, who, given, inputs, id_of(given.id, idempotency_key), "image_edit")


# -- reading what is asked ----------------------------------------------------------------------


async def read_edit(request: Request) -> tuple[Edit, list[bytes], bytes | None]:
    """Return a request for edits, its pictures' files, and its mask's; BadRequest."""
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            given = Edit.model_validate_json(await request.body())
        except ValidationError as error:
            raise fault_in_body(error) from None
        mask = file_of(given.mask, "mask") if given.mask else None
        return given, [file_of(image, "image") for image in given.image], mask
    async with request.form(max_files=MAX_IMAGES_IN + 1, max_fields=64, max_part_size=400_000) as form:
        images = [await file.read() for name in ("image", "image[]") for file in uploads(form, name)]
        masks = [await file.read() for file in uploads(form, "mask")]
        fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str) and value}
        fields["loras"] = [text for name in ("loras", "loras[]") for text in form.getlist(name)]
        fields = {name: value for name, value in fields.items() if name not in ("image", "mask")}
    try:
        return Edit.model_validate(fields), images, masks[0] if masks else None
    except ValidationError as error:
        raise fault_in_body(error) from None


def uploads(form: FormData, name: str) -> list[UploadFile]:
    found = form.getlist(name)
    if any(isinstance(one, str) for one in found):
        raise BadField(name, f"{name} is no file.", "Send it as a file of a multipart form.")
    return [one for one in found if isinstance(one, UploadFile)]


def wanted(
    given: ImageOptions, inputs: Inputs, models: Sequence[ModelView], qualities: dict[str, Quality], job_id: str
) -> tuple[Wanted, ModelView, str]:
    """Return the jobs of a request, the model that they are for, and their quality; BadRequest."""
    told: list[str] = []
    effort = given.quality or "auto"
    effort = EFFORTS.get(effort, effort)
    quality = qualities.get(effort)
    if quality is None and effort != "high":
        fits = ", ".join(["auto", "high", *qualities])
        raise BadField("quality", f"{effort[:40]!r} is no quality.", f"There are {fits}.")
    own = any(given.model in (model.name, model.model) for model in models)
    named = given.model if own or quality is None or quality.model is None else quality.model
    model = model_named(models, named, told)
    if given.background == "transparent":
        raise BadField("background", f"{model.name} makes no transparent pictures.", "Leave background out.")
    check_takes(model, bool(inputs.images), inputs.mask is not None)
    width, height = size_of(given.size or "auto")
    request = JobRequest(
        prompt=given.prompt, model=model.name or None, negative_prompt=given.negative_prompt, width=width,
        height=height, steps=given.steps or steps_for(model, quality), guidance=given.guidance,
        cfg_scale=given.cfg_scale, seed=given.seed, strength=given.strength, controlnet=given.controlnet,
        refiner=given.refiner, loras=loras_of(given.loras), id=job_id, **inputs.fields,
    )  # fmt: skip
    return Wanted(spread(request, given.count, model), inputs.tensors, told), model, effort


def steps_for(model: ModelView, quality: Quality | None) -> int | None:
    """Return the number of steps for a quality; None: the model's own. A model of few steps has none to spare."""
    own = model.description.steps
    if quality is None or quality.steps == 1 or (own <= FEW_STEPS and quality.steps < 1):
        return None
    return max(1, round(own * quality.steps))


def base_of(request: Request) -> str:
    """Return the address that a request came to, as its sender knows it: a proxy says so where it speaks TLS."""
    scheme = "https" if request.headers.get("x-forwarded-proto") == "https" else request.url.scheme
    return f"{scheme}://{request.url.netloc}"


# -- answering ----------------------------------------------------------------------------------


async def respond(
    request: Request, who: Caller, given: ImageOptions, inputs: Inputs, job_id: str, kind: str
) -> Response:
    """Submit what is asked, and answer once it is made, or with events meanwhile."""
    settings = who.http.settings
    models = await who.models(given.model)
    asked, model, quality = wanted(given, inputs, models, settings.http_qualities, job_id)
    if model.video:
        raise BadRequest(f"{model.name} makes videos, no pictures.", "POST /v1/videos makes them.")
    jobs = await asked.submit(who.client, watch=True)
    teller = Teller(request, who, given, asked.told, model, quality, kind, sum(one.nbytes for one in inputs.images))
    if given.stream:
        return stream(request, teller.events(jobs), fault)
    return await answer(request, teller.whole(jobs), {"X-Triptych-Model": model.name})


def fault(error: Exception) -> bytes:
    """Return the last event of a stream that failed."""
    return event({"type": "error", **body_of(error_of(error), "/v1/")}, "error")


class Teller:
    """Says what was made, in OpenAI's words."""

    def __init__(
        self,
        request: Request,
        who: Caller,
        given: ImageOptions,
        told: list[str],
        model: ModelView,
        quality: str,
        kind: str,
        pixels_in: int,
    ) -> None:
        self._request, self._who, self._given, self._told = request, who, given, told
        self._model, self._quality, self._kind, self._pixels_in = model, quality, kind, pixels_in // 3

    async def whole(self, jobs: list[Job]) -> dict[str, Any]:
        """Return the answer once all jobs are done."""
        await done(self._who.client, jobs)
        data = [picture for job in jobs for picture in await self._pictures(job)]
        recipe = jobs[0].recipe
        return Images(
            created=int(time.time()), data=data, output_format=self._given.suffix, quality=self._quality,
            size=f"{recipe.width}x{recipe.height}", usage=self._usage(jobs), model=self._model.name,
            jobs=[job.id for job in jobs], warnings=self._told,
        ).model_dump(exclude_none=True)  # fmt: skip

    async def events(self, jobs: list[Job]) -> AsyncIterator[bytes]:
        """Yield events as OpenAI's: a completed one for each picture."""
        for job in jobs:
            async for partial in self._partials(job):
                yield partial
            await done(self._who.client, [job])
            for picture in await self._pictures(job, inline=True):
                name = f"{self._kind}.completed"
                more = {**self._shape(job), "b64_json": picture.b64_json, "usage": self._usage([job]).model_dump()}
                yield event({"type": name, **more}, name)

    async def _partials(self, job: Job) -> AsyncIterator[bytes]:
        """Yield the previews that are wanted, each once a job has come so far; none where it ends before."""
        wanted, sent, client = self._given.partial_images or 0, 0, self._who.client
        if not wanted:
            return
        await client.preview(job.id)  # from now on previews are made
        async for change in client.events([job.id]):
            if change.state != "denoise" or sent == wanted:
                continue
            preview = await client.preview(job.id)
            if preview.file and preview.step * (wanted + 1) >= job.recipe.steps * (sent + 1):
                size = job.recipe.width, job.recipe.height
                file = await asyncio.to_thread(enlarged, preview.file, size, self._given.suffix)
                name = f"{self._kind}.partial_image"
                more = {**self._shape(job), "b64_json": text_of(file), "partial_image_index": sent}
                yield event({"type": name, **more}, name)
                sent += 1

    def _shape(self, job: Job) -> dict[str, Any]:
        recipe = job.recipe
        return {
            "created_at": int(time.time()), "size": f"{recipe.width}x{recipe.height}", "quality": self._quality,
            "background": "opaque", "output_format": self._given.suffix,
        }  # fmt: skip

    async def _pictures(self, job: Job, inline: bool = False) -> list[Picture]:
        who, suffix = self._who, self._given.suffix
        if self._given.response_format == "url" and not inline:
            base = base_of(self._request)
            paths = [who.http.links.path(who.key, job.id, i, suffix) for i in range(job.recipe.num_images)]
            return [Picture(url=base + path) for path in paths]
        files = await who.http.results.files(who.client, who.key, job, suffix, self._given.output_compression)
        return [Picture(b64_json=text_of(file)) for file in files]

    def _usage(self, jobs: Sequence[Job]) -> Usage:
        recipe = jobs[0].recipe
        text = -(-len(recipe.prompt.encode()) // BYTES_A_TOKEN)
        pixels = sum(job.recipe.num_images for job in jobs) * recipe.width * recipe.height
        taken, made = self._pixels_in // PATCH**2, pixels // PATCH**2
        return Usage(
            input_tokens=text + taken, input_tokens_details=TokenDetails(text_tokens=text, image_tokens=taken),
            output_tokens=made, output_tokens_details=TokenDetails(text_tokens=0, image_tokens=made),
            total_tokens=text + taken + made,
        )  # fmt: skip
